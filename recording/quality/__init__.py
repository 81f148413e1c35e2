"""Do images, masks and cameras belong together: of a calibration, of a recording, and of any dataset."""
