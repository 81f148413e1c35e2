"""Shows any output in the browser: results, sequences, samples, what the newest checkpoint makes of validation samples.

Gaussians to orbit, cameras with their images, rendered against true views; follows newer files.
"""

import argparse
import io
import logging
import sys
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, checked, server_library
from multiview.run import Stop, leave, main_guard


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("path", type=Path, help="folder: result, sequence, sample, dataset, checkpoints of Stage 2")
    parser.add_argument("--data", type=Path, help="dataset with a sequence's true views; split list for checkpoints")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=checked(int, 1, 65535), default=8080)
    parser.add_argument(
        "--refresh", type=checked(float, 0.1), default=3.0, help="seconds between looks for newer files"
    )
    given = parser.parse_args()
    viser = server_library("viser", given.host, given.port)
    from pipeline.viewer import Viewer, list_items

    find = partial(list_items, given.path.resolve(), given.data)
    next(iter(find().values()))[1]()  # what cannot be shown is told before a server stands
    logging.getLogger("websockets").setLevel(logging.WARNING)
    with Stop() as stop, suppress(KeyboardInterrupt):
        stop.in_loop = True
        with redirect_stdout(io.StringIO()):  # viser draws a box of addresses
            server = viser.ViserServer(given.host, given.port, "Mouse-FaceLift", verbose=False)
        server.gui.configure_theme(show_logo=False, show_share_button=False)  # sharing goes through a foreign server
        server.gui.main_panel.dock_right()
        viewer = Viewer(server, find, given.refresh)
        print(f"{given.path}: http://{given.host}:{given.port} (Ctrl-C ends it)", flush=True)
        while not stop.is_due():
            viewer.step()


if __name__ == "__main__":
    main_guard(main)
    leave()
