"""Writes the golden documents of README.md into this directory, and refuses to replace one that is there."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Execute
from crbd.engine.libtpms import LibtpmsEngine
from crbd.state.crb import CrbStateV3, saved
from crbd.state.document import Document, encode
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, Identity, Session, TpmState
from crbd.state.sealing import Seal
from tests.engine import commands as c
from tests.engine.conftest import MemoryStatePort
from tests.state import samples as s

HERE = Path(__file__).parent
NV_VALUE = b"golden"
PCR = 16
MEASURED = hashlib.sha256(b"measured").digest()
PASSPHRASE = b"correct horse"
COMMAND = c.nv_read(len(NV_VALUE))
CONFIGS = {1: CrbConfig.qemu_7_2(), 2: CrbConfig.qemu_7_2(), 3: CrbConfig()}


def main() -> None:
    """Make one TPM, and a document of it in every format version, plain and sealed."""
    port = MemoryStatePort()
    engine = LibtpmsEngine(port)
    engine.start()
    for command in (c.STARTUP_CLEAR, c.nv_define(len(NV_VALUE)), c.nv_write(NV_VALUE), c.pcr_extend(PCR, MEASURED)):
        assert c.code(engine.execute(command)) == c.SUCCESS
    answer = engine.execute(COMMAND)
    assert c.nv_value(answer) == NV_VALUE
    stamp = EngineStamp(engine.version.major, engine.version.minor, engine.version.micro)
    for version in CONFIGS:
        volatile = engine.get_state(StateKind.VOLATILE)
        assert volatile is not None
        document = Document(
            identity=Identity(s.UUID_A, f"golden {version}", version, s.WRITER, 1_700_000_000, bytes(32)),
            writer_id=b"writer of golden",
            written=1_700_000_000 + version,
            permanent=TpmState(port.states[StateKind.PERMANENT], stamp),
            volatile=TpmState(volatile, stamp),
            crb=registers(version, answer),
            session=Session(locality=0, buffer_size=0xF80, established=False, last_command=0x14E),
        )
        seal = Seal.create(s.UUID_A, [s.key(), s.passphrase(PASSPHRASE)])
        write(f"v{version}-plain.crbd", encode(document, format_version=version))
        write(f"v{version}-sealed.crbd", encode(document, seal, format_version=version))
    engine.close()


def registers(version: int, answer: bytes) -> CrbStateV3:
    """Version 1: a command was answered. 2: one executes. 3: one of locality 2 executes."""
    device = CrbDevice(CONFIGS[version])
    assert isinstance(device.submit(0 if version < 3 else 2, COMMAND), Execute)
    if version == 1:
        device.complete(answer)
    return saved(device.freeze())


def write(name: str, data: bytes) -> None:
    """Never over what is there: golden files are made once."""
    with (HERE / name).open("xb") as file:
        file.write(data)
    sys.stdout.write(f"{hashlib.sha256(data).hexdigest()}  {name}\n")


if __name__ == "__main__":
    main()
