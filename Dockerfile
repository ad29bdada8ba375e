# docker build -t chatserver .
# docker run -p 8000:8000 -e CHATSERVER_SECRET=… -e CHATSERVER_REDIS_URL=redis://… chatserver
#
# For production add CHATSERVER_ENVIRONMENT=production and what it then asks for by name.

FROM python:3.12-slim AS build
RUN python -m pip install --no-cache-dir uv
WORKDIR /src
COPY pyproject.toml uv.lock README.md LICENSE ./
# The locked packages alone first: a change of the code leaves this layer as it is.
RUN python -m venv --without-pip /opt/chatserver \
 && VIRTUAL_ENV=/opt/chatserver uv sync --active --frozen --no-dev --no-install-project --no-cache
COPY chatserver chatserver
RUN VIRTUAL_ENV=/opt/chatserver uv sync --active --frozen --no-dev --no-editable --no-cache

FROM python:3.12-slim
RUN useradd --uid 10001 --home-dir /var/lib/chatserver --create-home chatserver
COPY --from=build /opt/chatserver /opt/chatserver
USER 10001
ENV PATH=/opt/chatserver/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    CHATSERVER_HOST=0.0.0.0 \
    CHATSERVER_DATA_DIR=/var/lib/chatserver
WORKDIR /var/lib/chatserver
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready, not just alive; the certificate is not for 127.0.0.1, and nobody is in between.
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s CMD ["python", "-c", "\
import os, ssl, urllib.request as http; \
tls = 's' if os.environ.get('CHATSERVER_TLS_CERTFILE') else ''; \
port = os.environ.get('CHATSERVER_PORT') or '8000'; \
http.urlopen(f'http{tls}://127.0.0.1:{port}/readyz', timeout=2, context=ssl._create_unverified_context())"]
ENTRYPOINT ["chatserver"]
CMD ["serve"]
