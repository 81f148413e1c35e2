"""What the two kernel files share: the columns of their tables and the tile size.

numba's on-disk cache only notices a change of the file a kernel is in: after a change here, remove __pycache__.
"""

TILE_PX = 16

# Columns of the per-Gaussian table `splats` (float32), written by projection and read by compositing. The gradients
# that come back from compositing have the first ten, in the same order. U_REST and V_REST are what float32 leaves of
# the position: a tile subtracts its own corner first and adds them then, so that large pictures are no less exact.
U, V, CONIC_A, CONIC_B, CONIC_C, OPACITY, RED, GREEN, BLUE, DEPTH, REACH_X, REACH_Y, U_REST, V_REST = range(14)
NUM_COLUMNS, NUM_GRADS = 14, 10
