"""The server: opens a bundle, starts the engine, answers over HTTP until a signal ends it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from tokenizers import Tokenizer

from ..bundles import bundle
from ..bundles.manifest import TOKENIZER
from ..generation.snapshot import state_size
from ..runtimes import Runtime, default_runtime, open_runtime
from .app import make_app
from .chat_template import ChatTemplate
from .engine import Engine, EngineOptions
from .keys import Keys
from .metrics import Metrics
from .request_log import LineFormatter
from .response_store import ResponseStore
from .service import Service, ServiceLimits
from .state_store import StateStore

MIB = 1 << 20


@dataclass(frozen=True)
class ServerOptions:
    """What `megalodon-export serve` is told. Sizes are in MiB; None is a share of what is free at the start."""

    folder: Path
    runtime: str | None = None
    device: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    streams: int = 32
    queue: int = 256
    prefill_tokens: int = 256
    state_memory: int | None = None
    device_state_memory: int | None = None
    state_dir: Path | None = None
    state_disk: int = 8192
    response_days: float = 30.0
    key_file: Path | None = None
    origins: tuple[str, ...] = ()
    chat_template: Path | None = None
    drain_seconds: int = 30
    log_json: bool = False
    limits: ServiceLimits = field(default_factory=ServiceLimits)


def serve(options: ServerOptions) -> None:
    """Serve until SIGTERM or SIGINT, which let running requests end first."""
    _log_to_stderr(options.log_json)
    keys = Keys.of_file(options.key_file) if options.key_file is not None else Keys()
    manifest = bundle.read(options.folder)
    if not (options.folder / TOKENIZER).is_file():
        raise ValueError(f"{options.folder} has no {TOKENIZER}, which a server needs to read and write text")
    template = ChatTemplate.of_bundle(options.folder, options.chat_template)
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(_bound(options.host, options.port))
        if options.state_dir is not None:
            stack.enter_context(_locked(options.state_dir))
        runtime = open_runtime(options.runtime or default_runtime(manifest), options.folder, manifest, options.device)
        name = options.name or options.folder.resolve().name
        metrics = Metrics(name)
        tokenizer = Tokenizer.from_file(str(options.folder / TOKENIZER))
        engine = _engine(runtime, tokenizer, options, metrics)
        stack.callback(engine.close)
        service = Service(engine, tokenizer, name, template, options.limits, _responses(options))
        metrics.watch(engine, service.responses)
        app = make_app(service, metrics, keys, options.origins, log=True)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=options.drain_seconds,
        )
        _Server(config).run(sockets=[taken])


class _Server(uvicorn.Server):
    """Says where it listens, and ends with status 0 when a signal has ended it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for one in sockets or []:
            host, port = one.getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals end the server, and nothing else."""
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, self.handle_exit) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)


def _bound(host: str, port: int) -> socket.socket:
    """A socket of an address; OSError, before anything is opened, for one that is not free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror}; choose another --port") from error
    return made


def _engine(runtime: Runtime, tokenizer: Tokenizer, options: ServerOptions, metrics: Metrics) -> Engine:
    """The engine, with as many rows as memory allows: half of what is free."""
    one = state_size(runtime.config, runtime.dtype)
    free = _free_bytes(runtime.device)
    streams = min(options.streams, runtime.limits.max_batch, max(free // 2 // one - 1, 1))
    if streams < min(options.streams, runtime.limits.max_batch):
        print(f"memory for {streams} streams at a time, of {options.streams} wanted", file=sys.stderr)
    host, on_device = options.state_memory, options.device_state_memory
    host_bytes = _free_bytes(torch.device("cpu")) // 4 if host is None else host * MIB
    device_bytes = free // 8 if on_device is None else on_device * MIB
    store = StateStore(
        runtime.config,
        runtime.device,
        0 if runtime.device.type == "cpu" else device_bytes,
        host_bytes,
        options.state_dir / "prefixes" if options.state_dir is not None else None,
        options.state_disk * MIB,
    )
    settings = EngineOptions(streams=streams, queue=options.queue, piece=options.prefill_tokens)
    return Engine(runtime, tokenizer, settings, metrics, store)


def _responses(options: ServerOptions) -> ResponseStore:
    folder = options.state_dir / "responses" if options.state_dir is not None else None
    size = options.state_disk * MIB if folder is not None else min(options.state_disk, 1024) * MIB
    return ResponseStore(folder, options.response_days * 86400.0, size=size)


def _free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024
    return 4 << 30


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other servers off a state folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # states hold what was said
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another server uses the state folder {folder}; give this one another") from None
        yield
    finally:
        os.close(descriptor)


def _log_to_stderr(as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json))
    logger = logging.getLogger("megalodon_export")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
