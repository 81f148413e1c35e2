"""Which view stands where when the reference moves or the animal is mirrored: targets, prompts and cameras together.
Rotating the reference by k takes the stored view k as the input. With `azimuth_zero: reference` the world turns with
it, so that the input stands at the rig's reference direction again; with `heading` view k keeps its place and name.
Mirroring puts what stood at azimuth a to -a. Where the result is the rig again, views are put into the rig's order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multiview.cameras import Cameras, direction
from multiview.rig import ANGLE_TOLERANCE_DEG, LENGTH_TOLERANCE, ViewRig


@dataclass(frozen=True)
class Arrangement:
    """rows: [n], the stored view in each row. prompts: [n], the rig's prompt whose direction is nearest to the row's.
    turn_deg: by how much the world is turned. is_rig: the rows are the rig's own views in the rig's own order."""

    rows: Tensor
    prompts: Tensor
    turn_deg: float
    is_rig: bool

    def cameras(self, cameras: Cameras) -> Cameras:
        """Stored views' cameras [n] (of mirrored pictures: mirrored ones) -> the rows' cameras [n]."""
        return cameras[self.rows].rotate(self.turn_deg)


def arrange(rig: ViewRig, rotation: int = 0, *, mirrored: bool = False) -> Arrangement:
    """The rows of a sample whose reference moved on by `rotation` views and whose animal is mirrored or not."""
    reference, count = rig.reference_view, rig.num_views
    own = [(view.azimuth_deg, view.elevation_deg, rig.view_distance(view)) for view in rig.views]
    azimuth_deg, elevation_deg, distance = torch.tensor(own, dtype=torch.float64).unbind(-1)
    rows = (torch.arange(count) + rotation) % count
    found_deg = (-azimuth_deg if mirrored else azimuth_deg)[rows]
    turn_deg = float(azimuth_deg[reference] - found_deg[reference]) if rig.azimuth_zero == "reference" else 0.0
    found_deg = found_deg + turn_deg
    prompts = (direction(found_deg, elevation_deg[rows]) @ direction(azimuth_deg, elevation_deg).T).argmax(1)

    azimuth_error = ((found_deg - azimuth_deg[prompts] + 180) % 360 - 180).abs()
    elevation_error = (elevation_deg[rows] - elevation_deg[prompts]).abs()
    distance_error = (distance[rows] - distance[prompts]).abs() / distance
    is_rig = (
        max(azimuth_error.max(), elevation_error.max()) <= ANGLE_TOLERANCE_DEG
        and distance_error.max() <= LENGTH_TOLERANCE
        and int(prompts[reference]) == reference
    )
    if is_rig:  # the reference keeps its row, so the others can go to theirs
        order = prompts.argsort()
        rows, prompts = rows[order], prompts[order]
    return Arrangement(rows, prompts, turn_deg, bool(is_rig))
