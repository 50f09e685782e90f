# An image with pinned versions: docker build --build-arg=ACCELERATOR=tpu --tag=IMAGE .
# ACCELERATOR is cpu, cuda or tpu. For cuda, the host provides the driver; the CUDA libraries come
# with JAX.
FROM python:3.12-slim
ARG ACCELERATOR=cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /mixer

# Packages come first, because they change seldom: a code change then rebuilds only the last layers.
COPY requirements.txt ./
RUN pip install --no-deps -r requirements.txt
# For runs on gs://, Orbax uses this package to look up the type of the bucket.
RUN pip install -c requirements.txt "google-cloud-storage>=3"
# -c pins the plugins to the JAX version in requirements.txt.
RUN case "$ACCELERATOR" in \
      cpu) ;; \
      cuda) pip install -c requirements.txt "jax[cuda13]" ;; \
      tpu) pip install -c requirements.txt "jax[tpu]" ;; \
      *) echo "ACCELERATOR=$ACCELERATOR: cpu, cuda or tpu" >&2; exit 1 ;; \
    esac
COPY . .
RUN pip install --no-deps --no-build-isolation -e .

# No shell in between, so that Python gets SIGTERM, saves and exits.
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
