# What setup_mouse_env.sh does, in an image. Not built where this project is developed (no Docker there); its steps are
# those of the script, which is tested.
#   docker build -t mouse-facelift .
#   docker run --rm -v "$PWD:/data" mouse-facelift inference_mouse.py /data/photo.png --output_dir /data/outputs
# On a GPU: --gpus all --shm-size=8g, and a base image with nvcc (nvidia/cuda:*-devel), as gsplat compiles on first use.
FROM python:3.11-slim

WORKDIR /app
COPY setup_mouse_env.sh requirements.txt requirements-extra.txt ./
RUN bash setup_mouse_env.sh && rm -rf ~/.cache
COPY . .
ENTRYPOINT ["/app/.venv/bin/python"]
CMD ["inference_mouse.py", "--help"]
