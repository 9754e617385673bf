"""What time and labels do to patch and width."""

from __future__ import annotations

import math

from pipeline.plan import Budget, Plan
from pipeline.sizing import LEAST_PATCHES, PATCH_KEPT

from .test_planner import Spacing, fingerprint, plan_for


class TestTime:
    LARGE = ((128, 128, 128),), ((4.0, 4.0, 4.0),)

    def _plan(self, extent_mm: Spacing, minutes: float) -> Plan:
        shapes, spacings_mm = self.LARGE
        return plan_for(fingerprint(shapes, spacings_mm, extent_mm=extent_mm), Budget("cpu", 64.0, minutes, 240.0))

    def test_small_labels_in_a_large_volume_get_smaller_patches_before_a_narrower_network(self) -> None:
        small, large = self._plan((100.0, 100.0, 100.0), 60.0), self._plan((340.0, 340.0, 340.0), 60.0)
        assert small.patch_shape < large.patch_shape == (128, 128, 128)
        assert small.unet.features[0] > large.unet.features[0]

    def test_a_patch_holds_the_largest_label_with_room_as_long_as_width_can_give_way(self) -> None:
        plan = self._plan((100.0, 100.0, 340.0), 60.0)
        needed = 64 * 64 * 128  # 100 mm are 25 voxels, 340 mm with half as much again 128
        assert math.prod(plan.patch_shape) >= PATCH_KEPT * needed
        assert plan.unet.features[0] > 8

    def test_a_budget_too_short_for_what_is_wanted_makes_do_with_less(self) -> None:
        plan = self._plan((340.0, 340.0, 340.0), 15.0)
        assert plan.unet.features[0] == 8
        assert plan.patch_shape == (128, 128, 128)
        assert f"with which {LEAST_PATCHES} patches can be seen" in plan.reasons["features"]
