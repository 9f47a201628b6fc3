"""The page on which a saved model is asked about pictures: `python -m moondream2.ask MODEL --serve`.

Pictures and questions stay in the memory of this process: they are not written, not printed and not sent on, and the
page asks for nothing but what is here.
"""

import asyncio
import errno
import json
import secrets
import socket
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import UnidentifiedImageError

from moondream2.charts import PALETTE
from moondream2.cli import InputError
from moondream2.pictures import CUT, PictureError, open_content, remarks_on_values
from moondream2.verdict import sureness

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError:  # training does without
    uvicorn = None

PACKAGES = "starlette==1.10.0 uvicorn==0.54.0"
PORT = 7860
LOCAL = ("127.0.0.1", "localhost")  # what nobody reaches from another computer
MOST_PICTURES = 16  # whose embeddings, 3 MB each, are kept: those that were asked about last
MOST_BYTES = 2**28  # of a picture's file
MOST_QUESTION_BYTES = 2**20
ROOM = 16  # positions for the beginning of an answer, at least
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; style-src 'nonce-{0}'; script-src 'nonce-{0}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Refused(Exception):
    """What stands on the page in place of an answer, with HTTP's number for it."""

    def __init__(self, message, status=422):
        super().__init__(message)
        self.status = status


class Asked:
    """A model that is asked about pictures, each encoded once and known by a name that nobody can guess."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.embeds = model, tokenizer, OrderedDict()

    def look(self, content):
        """Encodes the picture in a file's bytes: {"picture": its name, "remarks": what is to be said of it}."""
        image, remarks = decoded(content)
        name = secrets.token_urlsafe(16)
        self.embeds[name] = self.model.encode_image(image)
        while len(self.embeds) > MOST_PICTURES:
            self.embeds.popitem(last=False)
        return {"picture": name, "remarks": remarks}

    def answer(self, name, question):
        """{"answer", "sure", "is_cut"}: its text, how probable the model finds it, and whether it has no end.

        Raises:
            Refused: the question can't be asked; with status 404, the picture is to be sent once more.
        """
        if not question.strip():
            raise Refused("There is no question yet.")
        question = question.encode(errors="replace").decode()  # half a character is no text
        config = self.model.config
        tokens, most = len(config.prompt_ids([question], self.tokenizer)[0]), config.max_text_tokens - ROOM
        if tokens > most:
            raise Refused(f"The question is too long: it makes {tokens:,} tokens, and {most:,} fit.")
        if name not in self.embeds:
            raise Refused("The picture is not known any more.", 404)
        self.embeds.move_to_end(name)
        ((answer,),) = self.model.answer_questions(
            self.embeds[name], [[question]], self.tokenizer, return_probabilities=True
        )
        return {"answer": answer.text, "sure": sureness(answer.probability), "is_cut": answer.is_cut}


def decoded(content):
    """The picture in a file's bytes, and a list of what is to be said of it; raises Refused."""
    try:
        (image, remarks), is_cut = open_content(content, lambda image: (image, list(remarks_on_values(image))))
    except PictureError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise Refused("This is no picture, or in a format that Pillow does not read.") from None
        kind = f"{error.kind[0].upper()}{error.kind[1:]}"
        raise Refused(f"{kind}: {str(error).rstrip('.')}.") from None
    return image, [*remarks, *([CUT] if is_cut else [])]


async def body(request, most, too_much):
    """What a page of this server sent, as bytes."""
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":  # another site's page, in this browser
        raise Refused("Only the page of this server may ask.", 403)
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise Refused(too_much, 413)
    return bytes(content)


def build_app(asked, title, host, pool):
    """The page and its two requests; `pool`, of one thread, has the model to itself."""
    is_local = host in LOCAL
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = templates.get_template("serve.html.jinja")
    too_large = f"Picture too large: its file has more than {MOST_BYTES // 2**20} MiB."

    async def answered(function, *arguments):
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, function, *arguments))

    async def page(request):
        said = {"title": title, "is_local": is_local, "most_bytes": MOST_BYTES, "too_large": too_large}
        nonce = secrets.token_urlsafe(16)
        headers = {"Content-Security-Policy": POLICY.format(nonce)}
        return HTMLResponse(template.render(said, palette=PALETTE, nonce=nonce), headers=headers)

    async def look(request):
        return await answered(asked.look, await body(request, MOST_BYTES, too_large))

    async def ask(request):
        content = await body(request, MOST_QUESTION_BYTES, "The question is too long.")
        try:
            said = json.loads(content)
            name, question = str(said["picture"]), str(said["question"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused('Send {"picture": its name, "question": a text}.', 400) from None
        return await answered(asked.answer, name, question)

    routes = [Route("/", page), Route("/picture", look, methods=["POST"]), Route("/ask", ask, methods=["POST"])]
    # Else a site that gives its own name this computer's address could ask as if it were the page.
    names = [*LOCAL] if is_local else ["*"]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)],
        exception_handlers={Refused: refused, ClientDisconnect: gone, Exception: failed},
    )


async def refused(request, error):
    return JSONResponse({"error": str(error)}, error.status)


async def gone(request, error):
    """For a page that was closed while it sent: nobody reads this."""
    return Response(status_code=400)


async def failed(request, error):
    """For what nobody has thought of; the traceback is printed, and the server goes on."""
    return JSONResponse({"error": "The model failed. The terminal in which it runs says why."}, 500)


def listen(host, port):
    """A socket that listens, before a model is loaded for it."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is taken: give another --port") from None
        raise InputError(
            f"cannot listen on port {port} of {host}: {getattr(error, 'strerror', None) or error}"
        ) from None


def serve(load, title, host, port):
    """Serves the page until ctrl-C.

    Args:
        load: gives (model, tokenizer).
        title: of the page, the model's name.
        host: the address to listen on.
        port: 0 for any that is free.
    Raises:
        InputError: a library is missing, or the port is taken.
    """
    if uvicorn is None:
        raise InputError(f"the page needs libraries that training does without: pip install {PACKAGES}")
    with listen(host, port) as listening, ThreadPoolExecutor(1) as pool:
        if host not in LOCAL:
            print(f"warning: whoever reaches {host} can ask this model, and nothing is encrypted", file=sys.stderr)
        try:
            app = build_app(Asked(*load()), title, host, pool)
            address = f"[{host}]" if ":" in host else host
            print(f"{title} answers on http://{address}:{listening.getsockname()[1]} (ctrl-C ends it)", flush=True)
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
        except KeyboardInterrupt:  # which the server raises once it has ended
            print("Stopped: nothing of the pictures and questions is kept")
