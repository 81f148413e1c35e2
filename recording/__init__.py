"""Raw recordings (synchronized videos, mask videos, one calibration) to sample folders; README.md lists the files."""
