"""Mice from an external skinned mesh (an .npz that the user has; none ships): pose, skin, sample into a SplatCloud.

Rest pose: nose towards -y, z up, left +x. Skin weights are sparse (weights_*), parents come first, bone_scale_group 1..
indexes bone_scale, keypoint k is the mean of vertices or joints keypoint_ids[keypoint_ptr[k] : keypoint_ptr[k + 1]].
Of the poses, local_rotvec [p, j, 3] holds absolute local rotations, bone_scale [p, g], global_R [p, 3, 3].
"""

import zipfile
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from synthetic import surface as parts
from synthetic.coat import random_coat
from synthetic.scene import KEYPOINT_NAMES, SplatCloud, random_light, splats_from_surface
from synthetic.skeleton import TAIL_REACH, random_length, unit

BODY_KEYS = (
    "vertices faces weights_vertex weights_joint weights_value parents joint_names rest_joints rest_local_rot "
    "rest_local_trans bone_scale_group keypoint_is_vertex keypoint_ptr keypoint_ids vertex_colour_linear vertex_fur"
).split()
SNOUT, SPINE, TAIL_BASE = (KEYPOINT_NAMES.index(name) for name in ("Snout", "SpineF", "TailBase"))


class BodyModelMice:
    """Draws mice from a body model and its poses; called like `scene.make_mouse`."""

    def __init__(self, body_path: Path | str, pose_path: Path | str) -> None:
        a = self.arrays = {}
        for path, keys in ((body_path, BODY_KEYS), (pose_path, ("local_rotvec", "bone_scale", "global_R"))):
            try:
                with np.load(path, allow_pickle=False) as archive:
                    a |= {key: archive[key] for key in keys}
            except (OSError, zipfile.BadZipFile, EOFError, KeyError) as error:
                expected = f"an .npz with {', '.join(keys)} is expected"
                raise ValueError(f"{path} cannot be used: {error}; {expected}") from error
        a |= {key: value.astype(np.float64) for key, value in a.items() if value.dtype == np.float32}
        count, joints, faces, vectors = len(a["vertices"]), len(a["parents"]), a["faces"], a["local_rotvec"]
        if vectors.shape[1:] != (joints, 3):
            raise ValueError(f"{pose_path}: local_rotvec must be [poses, {joints}, 3], got {list(vectors.shape)}")
        weights = csr_matrix((a["weights_value"], (a["weights_vertex"], a["weights_joint"])), (count, joints)).toarray()
        self.weights = csr_matrix(weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9))
        # Only the largest connected piece (the skin) and the dark ones (the eyes) are drawn: no teeth, no tongue.
        edges = (np.ones(len(faces) * 2), (faces[:, [0, 0]].ravel(), faces[:, 1:].ravel()))
        piece = connected_components(csr_matrix(edges, (count, count)), directed=False)[1]
        sizes = np.bincount(piece)
        eyes = np.bincount(piece, a["vertex_colour_linear"].mean(1)) / sizes < 0.01
        skin = np.arange(len(sizes)) == sizes.argmax()
        joint = a["joint_names"].astype(str)[weights.argmax(axis=1)]
        bare = np.where(np.char.startswith(joint, "tail"), parts.TAIL, parts.FOOT)
        bare = np.where(np.char.startswith(joint, "ear"), parts.EAR_OUTER, bare)
        self.part = np.where((eyes & ~skin)[piece], parts.EYE_PART, np.where(a["vertex_fur"] > 0.5, parts.FUR, bare))
        self.faces = faces[(skin | eyes)[piece][faces].all(axis=1)]
        # Along their first principal components, by their deviations, new poses stay plausible.
        flat, degrees = vectors.reshape(len(vectors), -1), max(len(vectors) - 1, 1)
        self.mean = flat.mean(axis=0)
        _, deviations, components = np.linalg.svd(flat - self.mean, full_matrices=False)
        self.components = deviations[: min(20, degrees), None] * components[: min(20, degrees)] / degrees**0.5

    def pose(self, local_rot: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Skins the mesh: local_rot [j, 3, 3], scales [g] -> vertices [v, 3], keypoints [22, 3], model units."""
        a, group = self.arrays, self.arrays["bone_scale_group"]
        place = a["rest_local_trans"] * np.where(group > 0, scales[np.maximum(group - 1, 0)], 1.0)[:, None]
        place[1:2] = 0.0  # the body's origin is joint 1
        turn, rest = local_rot.copy(), a["rest_local_rot"].copy()
        for j, parent in enumerate(a["parents"]):
            if parent >= 0:
                place[j] = place[parent] + turn[parent] @ place[j]
                turn[j], rest[j] = turn[parent] @ turn[j], rest[parent] @ rest[j]
        change = turn @ rest.transpose(0, 2, 1)
        vertices = np.einsum("vab,vb->va", (self.weights @ change.reshape(-1, 9)).reshape(-1, 3, 3), a["vertices"])
        vertices = vertices + self.weights @ (place - np.einsum("jab,jb->ja", change, a["rest_joints"]))
        return vertices, self._keypoints(vertices, place)

    def _keypoints(self, vertices: np.ndarray, joints: np.ndarray) -> np.ndarray:
        a = self.arrays
        sources = zip(a["keypoint_is_vertex"], np.split(a["keypoint_ids"], a["keypoint_ptr"][1:-1]), strict=True)
        return np.array([(vertices if is_vertex else joints)[ids].mean(axis=0) for is_vertex, ids in sources])

    def __call__(self, seed: int, index: int, *, coat=None, heading_deg=None, light=None, **_) -> SplatCloud:
        rng, a = np.random.default_rng(np.random.SeedSequence([seed, index, 4])), self.arrays
        number = int(rng.integers(len(a["local_rotvec"])))
        drawn = (self.mean + rng.normal(0, 0.8, len(self.components)) @ self.components).reshape(-1, 3)
        share = rng.uniform(0.0, 0.35)
        turns = Rotation.from_rotvec((1 - share) * a["local_rotvec"][number] + share * drawn).as_matrix()
        scales = a["bone_scale"][number] * np.exp(rng.normal(0, 0.02, a["bone_scale"].shape[1]))
        length, rest = random_length(rng), self.pose(a["rest_local_rot"], scales)[1]
        size = np.linalg.norm(rest[SNOUT] - rest[TAIL_BASE])
        tail = np.char.startswith(a["joint_names"].astype(str), "tail") & (a["bone_scale_group"] > 0)
        trunk = self.faces[(self.part[self.faces] != parts.TAIL).all(axis=1)]
        for _ in range(12):  # until a tail too long for the image is short enough
            vertices, keypoints = (points @ a["global_R"][number].T for points in self.pose(turns, scales))
            # The center of the volume that the trunk encloses, about a point within: the mesh is not quite closed.
            inside = vertices[trunk].reshape(-1, 3).mean(axis=0)
            corners = vertices[trunk] - inside
            volume = np.linalg.det(corners)
            center = inside + volume @ corners.mean(axis=1) * 0.75 / volume.sum()
            vertices, keypoints = (vertices - center) / size, (keypoints - center) / size
            if np.linalg.norm(vertices[self.part == parts.TAIL, :2], axis=1).max(initial=0.0) * length <= TAIL_REACH:
                break
            scales[np.unique(a["bone_scale_group"][tail]) - 1] *= 0.92
        ahead = keypoints[SPINE] - keypoints[TAIL_BASE]
        back = Rotation.from_euler("z", np.arctan2(-ahead[0], -ahead[1])).as_matrix()  # turns the nose to -y
        floor = np.array([0.0, 0.0, vertices[self.faces][..., 2].min()])
        drawn_coat, drawn_light, heading = random_coat(rng, coat), random_light(rng), float(rng.uniform(0, 360))
        surface = self._surface(vertices @ back.T - floor, rng)
        told = {"center": -floor, "keypoints": keypoints @ back.T - floor, "pose": f"library {number}"}
        cloud = splats_from_surface(surface, drawn_coat, light or drawn_light, rng, length=length, **told)
        return cloud.facing(heading if heading_deg is None else heading_deg)

    def _surface(self, vertices: np.ndarray, rng: np.random.Generator) -> parts.Surface:
        """Samples the posed mesh [v, 3] evenly, fur pushed out; body lengths."""
        a, faces, corners = self.arrays, self.faces, vertices[self.faces]
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # twice the area long
        normals = np.zeros_like(vertices)
        np.add.at(normals, faces.ravel(), np.repeat(across, 3, axis=0))
        total = 0.5 * np.linalg.norm(across, axis=1) * np.where(self.part[faces[:, 0]] != parts.FUR, 2.0, 1.2)
        total, count = np.cumsum(total), int(np.cumsum(total)[-1] / parts.SPACING**2)
        # Equally spaced in cumulated area, so that neighboring triangles get their fair share.
        ids = faces[np.searchsorted(total, (np.arange(count) + rng.random()) / count * total[-1])]
        u, v = np.sqrt(rng.random(count)), rng.random(count)
        mix = np.stack([1 - u, u * (1 - v), u * v], axis=1)
        points = self._keypoints(a["vertices"], a["rest_joints"])
        length = np.linalg.norm(points[SNOUT] - points[TAIL_BASE])
        rest = (a["vertices"] - [0.0, points[TAIL_BASE, 1], 0.0]) / length
        values = (vertices, normals, rest, a["vertex_fur"])
        points, normals, rest, fur = (np.einsum("nk,nk...->n...", mix, value[ids]) for value in values)
        normals, part = unit(normals), self.part[ids[np.arange(count), mix.argmax(1)]]
        out = np.where(part == parts.FUR, fur, np.where(part == parts.EYE_PART, 0.6, 0.0))  # eyes stay above the fur
        points = points + (0.018 * out)[:, None] * normals  # fur stands about 1.3 mm off the mesh
        points[:, 2] = np.maximum(points[:, 2], 0.0)
        x, behind, height = rest[:, 0], rest[:, 1], rest[:, 2] - (rest[:, 2].min() + 0.16)
        rest = np.stack([np.clip(-behind, 0, 1), x, height], axis=1)
        ventral, along = np.clip(-height / 0.12, -1, 1), np.where(part == parts.TAIL, np.clip(behind, 0, 1), 0.5)
        surface = parts.Surface(points, normals, [0.0, 1.0, -0.3], part, parts.SPACING * 1.05, rest, ventral, along)
        surface.openness = 0.50 + 0.50 * np.clip(0.75 + 0.5 * surface.normals[:, 2], 0, 1)
        return surface
