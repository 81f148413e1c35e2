"""The numbers of gsplat's `classic` mode, shared by the backends."""

NEAR_PLANE = 0.01  # world units; Gaussians with z below it are not drawn
FAR_PLANE = 1e10
EPS_2D = 0.3  # pixel^2 added to the diagonal of the projected covariance: no Gaussian falls between pixels
MIN_ALPHA = 1.0 / 255.0
MAX_ALPHA = 0.999
MIN_TRANSMITTANCE = 1e-4  # compositing stops before the Gaussian that would bring a pixel to or below this
TILE_PX = 16
MAX_EXTENT = 3.33  # standard deviations; sqrt(2 ln 255) rounded up
FOV_MARGIN = 0.3  # the Jacobian is evaluated at most this fraction of a half picture outside the picture
