"""Mice from an external skinned mesh (an .npz that the user has; none ships): pose, skin, sample into a SplatCloud.

Layout of the body file: vertices [v, 3], faces [f, 3], weights_vertex / weights_joint / weights_value [k] (sparse skin
weights), parents [j] (root -1, parents first), joint_names [j], rest_joints [j, 3], rest_local_rot [j, 3, 3],
rest_local_trans [j, 3], bone_scale_group [j] (1.. indexes bone_scale), keypoint_is_vertex / keypoint_ptr /
keypoint_ids, vertex_colour_linear [v, 3], vertex_fur [v] (1 fur, 0 bare). Rest pose: nose towards -y, z up, left +x.
Pose file: local_rotvec [p, j, 3] absolute local rotations, bone_scale [p, g], global_R [p, 3, 3].
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synthetic import surface as parts
from synthetic.cloud import BODY_LENGTH, KEYPOINT_NAMES, SplatCloud
from synthetic.coat import random_coat
from synthetic.scene import SPACING, Light, random_light, splats_from_surface
from synthetic.skeleton import TAIL_REACH

BODY_KEYS = (
    "vertices faces weights_vertex weights_joint weights_value parents joint_names rest_joints rest_local_rot "
    "rest_local_trans bone_scale_group keypoint_is_vertex keypoint_ptr keypoint_ids vertex_colour_linear vertex_fur"
).split()
POSE_KEYS = ("local_rotvec", "bone_scale", "global_R")
FUR_DEPTH = 0.018  # fur stands off the mesh, body lengths (about 1.3 mm)
COMPONENTS = 20  # of the poses' principal components


def read_arrays(path: Path | str, keys: tuple | list) -> dict[str, np.ndarray]:
    """The named arrays of an .npz; errors name the file and what it lacks."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; an .npz with {', '.join(keys)} is expected")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise ValueError(f"{path} lacks the arrays {', '.join(missing)}")
            return {key: archive[key] for key in keys}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error


def rotation_from_vector(vectors: np.ndarray) -> np.ndarray:
    """Axis-angle [..., 3] -> rotation matrices [..., 3, 3]."""
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vectors / np.maximum(angle[..., 0], 1e-12), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


@dataclass(frozen=True)
class BodyModel:
    """A skinned mesh; arrays as in the module's docstring. Only the skin and the eyes are kept of its parts."""

    arrays: dict
    part: np.ndarray  # [v] surface part of every vertex
    body_length: float  # nose to tail base at rest with all bone scales 1, model units

    @staticmethod
    def load(path: Path | str) -> BodyModel:
        arrays = read_arrays(path, BODY_KEYS)
        order = np.argsort(arrays["weights_vertex"], kind="stable")
        for key in ("weights_vertex", "weights_joint", "weights_value"):
            arrays[key] = arrays[key][order]
        counts = np.bincount(arrays["weights_vertex"], minlength=len(arrays["vertices"]))
        if (counts == 0).any():
            raise ValueError(f"{path}: {int((counts == 0).sum())} vertices have no skin weight")
        arrays = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()}
        part, keep = _vertex_parts(arrays)
        arrays["faces"] = arrays["faces"][keep[arrays["faces"]].all(axis=1)]
        return BodyModel(arrays, part, stretched_length(arrays, arrays["vertices"], arrays["rest_joints"]))

    def pose(self, local_rot: np.ndarray, bone_scale: np.ndarray, global_R: np.ndarray):
        """Skins the mesh. local_rot [j, 3, 3], bone_scale [g], global_R [3, 3] -> vertices [v, 3], joints [j, 3]."""
        a = self.arrays
        group = a["bone_scale_group"]
        stretch = np.where(group > 0, bone_scale[np.maximum(group - 1, 0)], 1.0)
        offsets = a["rest_local_trans"] * stretch[:, None]
        if len(offsets) > 1:
            offsets[1] = 0.0  # the body's origin is joint 1
        rotation, position = _chain(a["parents"], local_rot, offsets)
        rest_rotation, _ = _chain(a["parents"], a["rest_local_rot"], a["rest_local_trans"])
        change = rotation @ rest_rotation.transpose(0, 2, 1)
        shift = position - np.einsum("jab,jb->ja", change, a["rest_joints"])
        joint, vertex, weight = a["weights_joint"], a["weights_vertex"], a["weights_value"]
        moved = np.einsum("kab,kb->ka", change[joint], a["vertices"][vertex]) + shift[joint]
        starts = np.flatnonzero(np.r_[True, np.diff(vertex) > 0])
        total = np.add.reduceat(weight, starts)
        vertices = np.add.reduceat(weight[:, None] * moved, starts) / total[:, None]
        return vertices @ global_R.T, position @ global_R.T


def _chain(parents: np.ndarray, rotations: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    world, position = np.empty_like(rotations), np.empty_like(offsets)
    for j, parent in enumerate(parents):
        if parent < 0:
            world[j], position[j] = rotations[j], offsets[j]
        else:
            world[j] = world[parent] @ rotations[j]
            position[j] = position[parent] + world[parent] @ offsets[j]
    return world, position


def _vertex_parts(a: dict) -> tuple[np.ndarray, np.ndarray]:
    """Surface part per vertex, and which vertices to draw: the largest connected piece and the dark ones (eyes)."""
    faces, label = a["faces"], np.arange(len(a["vertices"]))
    while True:
        new = label.copy()
        for k in range(3):
            np.minimum.at(new, faces[:, k], label[faces].min(axis=1))
        new = new[new]
        if (new == label).all():
            break
        label = new
    names, index, counts = np.unique(label, return_inverse=True, return_counts=True)
    dark = np.bincount(index, a["vertex_colour_linear"].mean(1)) / counts < 0.01
    largest = np.arange(len(names)) == counts.argmax()
    strongest = np.zeros(len(label), dtype=int)
    order = np.argsort(a["weights_value"], kind="stable")
    strongest[a["weights_vertex"][order]] = a["weights_joint"][order]  # the largest weight is written last
    joint = np.array([str(name) for name in a["joint_names"]])[strongest]
    part = np.where(a["vertex_fur"] > 0.5, parts.FUR, parts.FOOT)
    part = np.where(np.char.startswith(joint, "tail") & (part == parts.FOOT), parts.TAIL, part)
    part = np.where(np.char.startswith(joint, "ear") & (part == parts.FOOT), parts.EAR_OUTER, part)
    part = np.where((dark & ~largest)[index], parts.EYE_PART, part)
    return part, (largest | dark)[index]


def keypoints_of(a: dict, vertices: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """[22, 3] means of the vertices or joints that define each keypoint."""
    rows = []
    for k, is_vertex in enumerate(a["keypoint_is_vertex"]):
        ids = a["keypoint_ids"][a["keypoint_ptr"][k] : a["keypoint_ptr"][k + 1]]
        rows.append((vertices if is_vertex else joints)[ids].mean(axis=0))
    return np.array(rows)


def stretched_length(a: dict, vertices: np.ndarray, joints: np.ndarray) -> float:
    """Nose to tail base of a mesh in its rest pose, model units."""
    rest = keypoints_of(a, vertices, joints)
    return float(np.linalg.norm(rest[KEYPOINT_NAMES.index("Snout")] - rest[KEYPOINT_NAMES.index("TailBase")]))


@dataclass(frozen=True)
class BodyModelMice:
    """Draws mice from a body model; called like `scene.make_mouse`.

    poses: arrays of POSE_KEYS. mean [j * 3], components [c, j * 3] and deviations [c]: their principal components.
    """

    model: BodyModel
    poses: dict
    mean: np.ndarray
    components: np.ndarray
    deviations: np.ndarray

    @staticmethod
    def load(body_path: Path | str, pose_path: Path | str | None) -> BodyModelMice:
        if pose_path is None:
            raise ValueError(f"{body_path}: the rest pose is no natural posture; give poses with --body_model_poses")
        model = BodyModel.load(body_path)
        poses = {k: v.astype(np.float64) for k, v in read_arrays(pose_path, POSE_KEYS).items()}
        joints = len(model.arrays["parents"])
        if poses["local_rotvec"].shape[1:] != (joints, 3):
            raise ValueError(
                f"{pose_path}: local_rotvec must be [poses, {joints}, 3] for {body_path}, "
                f"got {list(poses['local_rotvec'].shape)}"
            )
        flat = poses["local_rotvec"].reshape(len(poses["local_rotvec"]), -1)
        mean = flat.mean(axis=0)
        _, singular, components = np.linalg.svd(flat - mean, full_matrices=False)
        count = min(COMPONENTS, max(len(flat) - 1, 1))
        deviations = singular[:count] / np.sqrt(max(len(flat) - 1, 1))
        return BodyModelMice(model, poses, mean, components[:count], deviations)

    def __call__(
        self,
        seed: int,
        index: int,
        *,
        coat: str | None = None,
        pose: str | None = None,
        heading_deg: float | None = None,
        light: Light | None = None,
    ) -> SplatCloud:
        if pose is not None:
            raise ValueError(f"pose {pose!r}: a body model takes its poses from its pose library")
        rng = np.random.default_rng(np.random.SeedSequence([seed, index, 4]))
        number = int(rng.integers(len(self.poses["local_rotvec"])))
        drawn = self.mean + (rng.normal(0, 0.8, len(self.deviations)) * self.deviations) @ self.components
        share = rng.uniform(0.0, 0.35)
        vectors = (1 - share) * self.poses["local_rotvec"][number] + share * drawn.reshape(-1, 3)
        scales = self.poses["bone_scale"][number] * np.exp(rng.normal(0, 0.02, self.poses["bone_scale"].shape[1]))
        length = BODY_LENGTH * float(np.clip(rng.normal(1.03, 0.035), 0.94, 1.10))
        vertices, keypoints = self._placed(vectors, scales, self.poses["global_R"][number], length)
        drawn_coat, drawn_light, heading = random_coat(rng, coat), random_light(rng), float(rng.uniform(0, 360))
        floor = vertices[self.model.arrays["faces"]][..., 2].min()
        vertices, keypoints = vertices - [0, 0, floor], keypoints - [0, 0, floor]
        surface, normals = self._surface(vertices, rng)
        openness = 0.50 + 0.50 * np.clip(0.75 + 0.5 * normals[:, 2], 0, 1)
        splats = splats_from_surface(surface, openness, drawn_coat, light or drawn_light, rng, scale=length)
        cloud = SplatCloud(
            **splats,
            centre=np.array([0.0, 0.0, -length * floor], dtype=np.float32),
            keypoints=(length * keypoints).astype(np.float32),
            body_length=length,
            floor=0.0,
            meta={"pose": f"library {number}", "coat": drawn_coat.name},
        )
        heading = heading if heading_deg is None else heading_deg
        cloud.meta["heading_deg"] = heading % 360.0
        return cloud.centred().transformed(rotate_z_deg=-heading)

    def _placed(self, vectors: np.ndarray, scales: np.ndarray, turn: np.ndarray, length: float):
        """Vertices and keypoints in body lengths: centre at the origin, heading -y; a tail too long is shortened."""
        model = self.model
        group = model.arrays["bone_scale_group"]
        tail_joints = np.char.startswith(model.arrays["joint_names"], "tail")
        tail_groups = np.unique(group[tail_joints & (group > 0)])
        on_tail = model.part == parts.TAIL
        rest = model.pose(model.arrays["rest_local_rot"], scales, np.eye(3))
        size, rotations = stretched_length(model.arrays, *rest), rotation_from_vector(vectors)
        for _ in range(12):
            vertices, joints = model.pose(rotations, scales, turn)
            keypoints = keypoints_of(model.arrays, vertices, joints)
            centre = volume_centre(vertices, model.arrays["faces"][~on_tail[model.arrays["faces"]].any(axis=1)])
            vertices, keypoints = (vertices - centre) / size, (keypoints - centre) / size
            if not on_tail.any() or np.linalg.norm(vertices[on_tail, :2], axis=1).max() * length <= TAIL_REACH:
                break
            for g in tail_groups:
                scales[g - 1] *= 0.92
        ahead = keypoints[KEYPOINT_NAMES.index("SpineF")] - keypoints[KEYPOINT_NAMES.index("TailBase")]
        angle = np.arctan2(-ahead[0], -ahead[1])  # azimuth of the nose; turned back to -y
        c, s = np.cos(angle), np.sin(angle)
        rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        return vertices @ rotation.T, keypoints @ rotation.T

    def _surface(self, vertices: np.ndarray, rng: np.random.Generator) -> tuple[parts.Surface, np.ndarray]:
        """Even samples of the posed mesh, fur pushed out, as a Surface in body lengths; and their normals."""
        a = self.model.arrays
        faces = a["faces"]
        corners = vertices[faces]
        area_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        vertex_normals = np.zeros_like(vertices)
        for k in range(3):
            for c in range(3):
                vertex_normals[:, c] += np.bincount(faces[:, k], area_normals[:, c], minlength=len(vertices))
        area = 0.5 * np.linalg.norm(area_normals, axis=1)
        fine = np.isin(self.model.part[faces[:, 0]], (parts.EYE_PART, parts.FOOT, parts.TAIL, parts.EAR_OUTER))
        weight = area * np.where(fine, 2.0, 1.2)
        total = np.cumsum(weight)
        count = int(total[-1] / SPACING**2)
        # systematic: equally spaced in cumulated area, so that neighbouring triangles get their fair share
        pick = np.searchsorted(total, (np.arange(count) + rng.random()) / count * total[-1])
        pick = np.minimum(pick, len(faces) - 1)
        u, v = np.sqrt(rng.random(count)), rng.random(count)
        mix = np.stack([1 - u, u * (1 - v), u * v], axis=1)
        ids = faces[pick]

        def at(values: np.ndarray) -> np.ndarray:
            return np.einsum("nk,nk...->n...", mix, values[ids])

        normals = at(vertex_normals)
        normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
        part = self.model.part[ids[np.arange(count), mix.argmax(1)]]
        rest = at(a["vertices"]) / self.model.body_length
        base = keypoints_of(a, a["vertices"], a["rest_joints"])[KEYPOINT_NAMES.index("TailBase")]
        station = np.clip(base[1] / self.model.body_length - rest[:, 1], 0, 1)
        fur = at(a["vertex_fur"])
        out = np.where(part == parts.FUR, fur, np.where(part == parts.EYE_PART, 0.6, 0.0))  # eyes stay above the fur
        points = at(vertices) + (FUR_DEPTH * out)[:, None] * normals
        points[:, 2] = np.maximum(points[:, 2], 0.0)
        middle = rest[:, 2] - (rest[:, 2].min() + 0.16)
        surface = parts.Surface(
            points=points,
            normals=normals,
            flow=np.broadcast_to([0.0, 1.0, -0.3], points.shape),
            part=part,
            rest=np.stack([station, rest[:, 0], middle], axis=1),
            ventral=np.clip(-middle / 0.12, -1, 1),
            along=np.where(part == parts.TAIL, np.clip((rest[:, 1] - base[1] / self.model.body_length), 0, 1), 0.5),
            size=np.full(count, SPACING * 1.05),
            number=np.arange(count),
        )
        return surface, normals


def volume_centre(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[3] centre of the volume that a (nearly) closed mesh encloses."""
    corners = vertices[faces]
    origin = corners.reshape(-1, 3).mean(axis=0)
    corners = corners - origin
    volume = np.einsum("ni,ni->n", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
    total = volume.sum()
    if abs(total) < 1e-12:
        return origin
    return origin + (volume[:, None] * corners.mean(axis=1) * 0.75).sum(axis=0) / total
