"""Raw recordings (synchronised videos, mask videos, one calibration) to sample folders, and back.

calibration/     calibration files of every usual format <-> Calibration (K, distortion, w2c in float64), checked
video.py         finding and sequentially decoding the videos, or folders of pictures
streams.py       that decoding spread over processes, each video in one
masks.py         cleaning masks, what is measured on them
segment.py       masks for recordings without any, from the background
tracks.py        the cleaned masks on disk between the two passes of an import
centre.py        the animal's centre, smoothing, the world's up, the animal's heading
geometry.py      world scale, naming views by measured direction, label cameras
rectify.py       the exact warp: homography of a rotation about the camera centre
png.py           picture files of what it cut out
kernels.py       compiled loops over pixels and points
lanes.py         what the processes of an import do, one camera each
settings.py      what an import is asked to do
analysis.py      the recording's parts, and what its masks say about the animal
output.py        writing samples: complete or not at all, shards
splits.py        which samples train and which validate
process.py       the import: analyse, plan, write, report
quality/         do images, masks and cameras belong together: of a calibration, a recording, any dataset
write.py         a raw recording from renderings (for tests and demonstrations)
film.py          what a real camera adds to a rendering: lens, light, noise; and the truth
round_trip.py    whether an import gives back what was filmed
"""
