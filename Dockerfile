# The gateway, as user 65532, on a root file system that nobody writes to. Its state is in the volume
# /var/lib/gateway, its configuration in /etc/gateway/gateway.yaml. No shell is needed to run it.
#
#   docker build --tag image-gateway .
#   docker run --read-only --tmpfs /tmp --publish 8080:8080 --volume gateway:/var/lib/gateway \
#     --volume ./gateway.yaml:/etc/gateway/gateway.yaml:ro image-gateway
#
# A minor version's tag gets Python's and Debian's security fixes with every build. To have the same
# bytes again instead, name a digest: --build-arg BASE=docker.io/library/python@sha256:...
ARG BASE=docker.io/library/python:3.13-slim-trixie

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# What runs is one environment, what builds is another, which stays behind.
COPY requirements.txt requirements-build.txt ./
RUN python -m venv tools \
 && python -m venv --without-pip /opt/gateway \
 && tools/bin/python -m pip install --quiet --require-hashes --only-binary :all: \
      --requirement requirements-build.txt \
 && tools/bin/python -m pip --python /opt/gateway/bin/python install --quiet --no-compile \
      --require-hashes --only-binary :all: --requirement requirements.txt

# Nine tenths of uvloop's library are for debuggers. Where Debian cannot be reached they stay.
# hadolint ignore=DL3008,DL3009
RUN { apt-get update -qq && apt-get install -qq -y --no-install-recommends binutils; } >/dev/null \
 && find /opt/gateway -path '*/uvloop/*.so' -exec strip --strip-debug {} + \
 || echo "no binutils: the image is 14 MB larger"

COPY . source
RUN tools/bin/python -m pip wheel --quiet --no-index --no-deps --no-build-isolation \
      --wheel-dir wheel ./source \
 && tools/bin/python -m pip --python /opt/gateway/bin/python install --quiet --no-compile \
      --no-index --no-deps wheel/*.whl

# The official images have no byte code of Python's own modules, and later nobody can keep it.
# /etc/gateway/data is the volume, so that relative paths of a configuration lead there; the volume is
# of root's group too, for platforms that choose the user (OpenShift).
RUN PYTHONPYCACHEPREFIX=/opt/gateway/compiled python -m compileall -q -j 0 \
      --invalidation-mode unchecked-hash \
      -x '/(test|idlelib|tkinter|turtledemo|lib2to3|ensurepip|pydoc_data|(site|dist)-packages/pip)/' \
      "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" /opt/gateway/lib \
 && mkdir -p image/etc/gateway state \
 && mkdir -m 0770 state/gateway \
 && cp source/config/gateway.yaml image/etc/gateway/ \
 && ln -s /var/lib/gateway image/etc/gateway/data

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="image-gateway" \
      org.opencontainers.image.description="A self-hosted, OpenAI-compatible gateway for images" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/gateway /opt/gateway
COPY --from=build /build/image /
COPY --from=build --chown=65532:0 /build/state /var/lib
ENV PATH=/opt/gateway/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPYCACHEPREFIX=/opt/gateway/compiled \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    GATEWAY_CONFIG=/etc/gateway/gateway.yaml
USER 65532:65532
WORKDIR /var/lib/gateway
VOLUME /var/lib/gateway
EXPOSE 8080
STOPSIGNAL SIGTERM
# It asks the port of the configuration: set server.port, or GATEWAY_SERVER__PORT. Of `serve --port` it
# knows nothing, and would call the gateway unhealthy.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-m", "gateway.healthcheck"]
ENTRYPOINT ["gateway"]
CMD ["serve"]
