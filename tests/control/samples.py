"""What goes over the control channel, written out by hand from swtpm's tpm_ioctl.h: one table for all tests."""

from __future__ import annotations

from crbd.control import messages as m

FD = 70
"""The descriptor that the samples' SET_DATAFD carries."""

REQUESTS: list[tuple[str, m.Request]] = [
    ("00000001", m.GetCapability()),
    ("00000002 00000000", m.Init(m.InitFlag(0))),
    ("00000002 00000001", m.Init(m.InitFlag.DELETE_VOLATILE)),
    ("00000002 80000001", m.Init(m.InitFlag(0x80000001))),
    ("00000003", m.Shutdown()),
    ("00000004", m.GetTpmEstablished()),
    ("00000005 03", m.SetLocality(3)),
    ("00000005 ff", m.SetLocality(255)),
    ("00000006", m.HashStart()),
    ("00000007 00000000", m.HashData(b"")),
    ("00000007 00000005 68656c6c6f", m.HashData(b"hello")),
    ("00000008", m.HashEnd()),
    ("00000009", m.CancelTpmCmd()),
    ("0000000a", m.StoreVolatile()),
    ("0000000b 00", m.ResetTpmEstablished(0)),
    ("0000000c 00000001 00000002 00000c00", m.GetStateBlob(m.StateFlag.DECRYPTED, 2, 3072)),
    ("0000000d 00000002 00000001 00000003 0b10b0", m.SetStateBlob(m.StateFlag.ENCRYPTED, 1, b"\x0b\x10\xb0")),
    ("0000000d 00000000 00000003 00000000", m.SetStateBlob(m.StateFlag(0), 3, b"")),
    ("0000000e", m.Stop()),
    ("0000000f", m.GetConfig()),
    ("00000010", m.SetDataFd(FD)),
    ("00000011 00000f80", m.SetBufferSize(0xF80)),
    ("00000012 8000000000000003 00000010 00000000", m.GetInfo(0x8000000000000003, 16)),
    ("00000013 0000012c", m.LockStorage(300)),
    ("000000c0", m.GetRegisters()),
    ("000000c1", m.Upgrade()),
    ("000000c2", m.TakeSnapshot()),
    ("000000c3 00000001 00000002 8a43", m.Restore(m.RestoreFlag.ALLOW_ROLLBACK, b"\x8aC")),
]

REPLIES: list[tuple[type[m.Request], str, m.Reply]] = [
    (m.GetCapability, "00000000 0001ffff", m.Capabilities(m.Capability(0x1FFFF))),
    (m.Init, "00000000", m.Done()),
    (m.Init, "00000009", m.Failure(9)),
    (m.Shutdown, "00000000", m.Done()),
    (m.GetTpmEstablished, "00000000 01 000000", m.Established(1)),
    (m.GetTpmEstablished, "0000000a", m.Failure(10)),
    (m.SetLocality, "0000003d", m.Failure(0x3D)),
    (m.SetLocality, "00000000", m.Done()),
    (m.HashStart, "00000000", m.Done()),
    (m.HashData, "00000017", m.Failure(0x17)),
    (m.HashEnd, "00000000", m.Done()),
    (m.CancelTpmCmd, "00000000", m.Done()),
    (m.StoreVolatile, "00000000", m.Done()),
    (m.ResetTpmEstablished, "00000000", m.Done()),
    (
        m.GetStateBlob,
        "00000000 00000002 00000004 00000004 cafe0001",
        m.StateBlob(0, m.StateFlag.ENCRYPTED, 4, b"\xca\xfe\0\1"),
    ),
    (m.GetStateBlob, "00000800 00000000 00000000 00000000", m.StateBlob(0x800)),
    (m.GetStateBlob, "0000000a 00000000 00000000 00000000", m.StateBlob(10)),
    (m.SetStateBlob, "00000000", m.Done()),
    (m.Stop, "00000000", m.Done()),
    (m.GetConfig, "00000000 00000003", m.Config(m.ConfigFlag.FILE_KEY | m.ConfigFlag.MIGRATION_KEY)),
    (m.SetDataFd, "0000001f", m.Failure(0x1F)),
    (m.SetDataFd, "00000000", m.Done()),
    (m.SetBufferSize, "00000000 00000f80 00000af6 00001000", m.BufferSizes(0xF80, 0xAF6, 0x1000)),
    (m.SetBufferSize, "0000000a", m.Failure(10)),
    (m.GetInfo, "00000000 00000003 00000003 7b7d00", m.Info(3, b"{}\0")),
    (m.LockStorage, "00000009", m.Failure(9)),
    (m.LockStorage, "00000000", m.Done()),
    (m.GetRegisters, "00000000 00000005 00000002 8100", m.Registers(5, b"\x81\0")),
    (m.Upgrade, "00000000 00000001 00000004 64 6f 6e 65", m.Outcome(True, b"done")),
    (m.TakeSnapshot, "00000000 00000001 00000002 8a43", m.Snapshot(True, b"\x8aC")),
    (m.Restore, "00000000 00000000 00000002 6e6f", m.Outcome(False, b"no")),
]
