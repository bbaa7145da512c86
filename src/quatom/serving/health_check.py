"""Ask a server of this machine whether it is well: `python -m quatom.serving.health_check [PORT]`.

The health check of the images. It needs no option that says whether the server has a certificate.
"""

import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection

TIMEOUT_SECONDS = 4.0
"""Less than an image gives its health check."""


def ask(port: int) -> HTTPResponse:
    """GET /health of this machine, over HTTP or, where that is not spoken, HTTPS.

    A certificate is for the name that clients use, so it is not checked here.

    Raises:
        OSError: nobody listens, or there is no answer in time.
        HTTPException: the answer is no HTTP.
    """
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    try:
        return _get(HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS))
    except (ConnectionRefusedError, TimeoutError):
        raise
    except (OSError, HTTPException):
        secure = HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS, context=unchecked)
        return _get(secure)


def _get(connection: HTTPConnection) -> HTTPResponse:
    connection.request("GET", "/health")
    return connection.getresponse()


def main(port: int = 8000) -> int:
    """Exit status 0 if it is well, else 1 and one line that says why not."""
    try:
        answer = ask(port)
        if answer.status == 200:
            return 0
        print(answer.read().decode(errors="replace"))
    except (OSError, HTTPException) as error:
        print(f"no answer from port {port}: {type(error).__name__}: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
