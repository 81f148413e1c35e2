"""Raw recordings (synchronised videos, mask videos, one calibration) to sample folders, and back.

calibration/     calibration files of every usual format <-> Calibration (K, distortion, w2c in float64), checked
misfit.py        whether a calibration belongs to the pictures, and what is the matter if not
check.py         a look at a calibration in numbers (--check), check_picture.py draws it
video.py         finding and sequentially decoding the videos
masks.py         cleaning masks, what is measured on them
geometry.py      the animal's centre, world scale, naming views by measured direction, label cameras
rectify.py       the exact warp: homography of a rotation about the camera centre
settings.py      what an import is asked to do
analysis.py      the recording's parts, and what its masks say about the animal
process.py       the import: analyse, plan, write, report
report.py        quality_report.json and quality_report.html
write.py         a raw recording from renderings (for tests and demonstrations)
"""
