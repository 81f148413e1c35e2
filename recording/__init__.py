"""Raw recordings (synchronized videos, mask videos, one calibration) to sample folders.

calibration/     calibration files of every usual format <-> Calibration (K, distortion, w2c in float64), checked
video.py         finding and sequentially decoding the videos, or folders of images
masks.py         masks read, or found before the background; cleaned, measured, and kept while an import runs
center.py        the animal's center, smoothing, the world's up, the animal's heading
geometry.py      world scale, naming views by measured direction, label cameras
rectify.py       the exact warp (homography of a rotation about the camera center), and the images cut out by it
workers.py       lanes of work in order, one camera each, spread over processes
settings.py      what an import is asked to do: the flags of scripts/process_mouse_data.py
analysis.py      the recording's parts, and what its masks say about the animal
importer.py      the import: analyse, plan, write samples and split lists, report
quality/         do images, masks and cameras belong together: of a calibration, a recording, any dataset
"""
