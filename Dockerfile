# syntax=docker/dockerfile:1.7
#
#   docker build -t phalanx .
#   docker run --rm -p 50051:50051 -p 9100:9100 -e PHALANX_INSECURE=true phalanx
#
# Without TLS the server listens in public only where it is told that this is meant. For the real thing mount certificates
# and set PHALANX_TLS__CERTIFICATE and PHALANX_TLS__KEY, or mount a configuration file and name it in PHALANX_CONFIG (the
# health check reads the same environment).
# For an NVIDIA GPU build with `--build-arg EXTRAS=[cuda]` and run with `--gpus all`.

FROM python:3.11-slim AS build
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/phalanx
WORKDIR /src

# The dependencies change rarely and weigh most: they are a layer of their own, made with empty packages.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir service models training \
 && touch service/__init__.py models/__init__.py training/__init__.py \
 && /opt/phalanx/bin/pip install --constraint constraints.txt ".${EXTRAS}" \
 && /opt/phalanx/bin/pip uninstall --yes phalanx-ensemble

COPY service service
COPY models models
COPY training training
RUN python -m pip wheel --no-deps --wheel-dir /wheels . \
 && /opt/phalanx/bin/pip install --no-deps /wheels/*.whl \
 && /opt/phalanx/bin/python -c "import sys, service.cli, models; assert 'torch' not in sys.modules"

FROM python:3.11-slim
COPY --from=build /opt/phalanx /opt/phalanx
COPY --chmod=644 <<'EOF' /opt/phalanx/health.py
# Exit 0 when grpc.health.v1 says SERVING on the address, and with the certificate, of the configuration in the environment.
import socket, ssl, sys
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service.config import load_config

config = load_config()
host = config.listen.host
place = ("127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host), config.listen.port
target = f"[{place[0]}]:{place[1]}" if ":" in place[0] else f"{place[0]}:{place[1]}"
if config.tls is None:
    channel = grpc.insecure_channel(target)
else:
    # trust the server's own certificate and no other, by the name that stands in it
    context = ssl.create_default_context(cafile=str(config.tls.certificate))
    context.check_hostname, context.verify_flags = False, context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN
    with socket.create_connection(place, 3) as raw, context.wrap_socket(raw) as secure:
        name = next(value for kind, value in secure.getpeercert()["subjectAltName"] if kind in ("DNS", "IP Address"))
    credentials = grpc.ssl_channel_credentials(config.tls.certificate.read_bytes())
    channel = grpc.secure_channel(target, credentials, [("grpc.ssl_target_name_override", name)])
answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
sys.exit(answer.status != health_pb2.HealthCheckResponse.SERVING)
EOF
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin phalanx
USER 10001:10001
WORKDIR /
ENV PATH=/opt/phalanx/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PHALANX_LISTEN=0.0.0.0:50051 \
    PHALANX_METRICS=0.0.0.0:9100
EXPOSE 50051 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "/opt/phalanx/health.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["phalanx"]
CMD ["serve"]
