# The program with its exact versions: docker build --build-arg=ACCELERATOR=tpu --tag=IMAGE .
# ACCELERATOR is cpu, cuda (drivers are the host's, CUDA's libraries come with JAX) or tpu.
FROM python:3.12-slim
ARG ACCELERATOR=cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /mixer

# What changes seldom comes first, so that a change of the code builds the last layers only.
COPY requirements.txt ./
RUN pip install --no-deps -r requirements.txt
# What Orbax asks about a bucket with, for runs on gs://.
RUN pip install -c requirements.txt "google-cloud-storage>=3"
# The plugins are held to the version of JAX that requirements.txt names.
RUN case "$ACCELERATOR" in \
      cpu) ;; \
      cuda) pip install -c requirements.txt "jax[cuda13]" ;; \
      tpu) pip install -c requirements.txt "jax[tpu]" ;; \
      *) echo "ACCELERATOR=$ACCELERATOR: cpu, cuda or tpu" >&2; exit 1 ;; \
    esac
COPY . .
RUN pip install --no-deps --no-build-isolation -e .

# SIGTERM reaches Python itself, which saves and leaves.
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
