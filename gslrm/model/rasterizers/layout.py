"""What the two kernel files share: the columns of their tables and the tile size.

numba's on-disk cache only notices a change of the file a kernel is in: after a change here, remove __pycache__.
"""

TILE_PX = 16

# Columns of the per-Gaussian table `splats` (float32), written by projection and read by compositing. The gradients
# that come back from compositing have the first ten, in the same order.
U, V, CONIC_A, CONIC_B, CONIC_C, OPACITY, RED, GREEN, BLUE, DEPTH, REACH_X, REACH_Y = range(12)
NUM_COLUMNS, NUM_GRADS = 12, 10
