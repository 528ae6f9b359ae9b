"""What `swtpm` prints and ends: help, version, capabilities, profiles."""

from __future__ import annotations

import json
from typing import Any

from crbd import __version__
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine
from crbd.server.seccomp import can_filter
from crbd.service.durable import DurableState
from crbd.store.memory import MemoryStore

LEVEL = "0.11.0"
"""The release of swtpm whose command line this is."""
VERSION = f"TPM emulator version {LEVEL}, of crbd {__version__}"

INFO_FEATURES = 4
INFO_ALGORITHMS = 8
INFO_COMMANDS = 16
INFO_PROFILES = 64
"""libtpms' TPMLIB_INFO_*: what `--print-info` adds up."""

_FIRST = (
    "tpm-2.0",
    "tpm-send-command-header",
    "flags-opt-startup",
    "flags-opt-disable-auto-shutdown",
    "ctrl-opt-terminate",
)
_WITH_FILTER = ("cmdarg-seccomp",)
_THEN = (
    "cmdarg-key-fd",
    "cmdarg-pwd-fd",
    "cmdarg-print-states",
    "cmdarg-chroot",
    "cmdarg-migration",
    "nvram-backend-dir",
    "nvram-backend-file",
)
_WITH_PROFILES = ("cmdarg-profile", "cmdarg-print-profiles")
_LAST = (
    "cmdarg-print-info",
    "tpmstate-opt-lock",
    "tpmstate-dir-backend-opt-backup",
    "tpmstate-dir-backend-opt-fsync",
    "cmdarg-pcap",
    "systemd-notify",
)


def spare_engine() -> Engine:
    """An engine that is asked, and never powered on. Raises EngineMissingError."""
    return LibtpmsEngine(DurableState(MemoryStore()))


def capabilities_json() -> str:
    """What this swtpm can do: what stands here works. Raises EngineMissingError, EngineError."""
    engine = spare_engine()
    try:
        told: dict[str, Any] = json.loads(engine.info(INFO_FEATURES)).get("TPMFeatures", {})
        sizes = [f"rsa-keysize-{size}" for size in told.get("RSAKeySizes", ())]
        with_profiles = _WITH_PROFILES if engine.supports_profiles else ()
        profiles = _profiles(engine) if engine.supports_profiles else ""
    finally:
        engine.close()
    with_filter = _WITH_FILTER if can_filter() else ()
    features = ", ".join(f'"{name}"' for name in (*_FIRST, *with_filter, *_THEN, *sizes, *with_profiles, *_LAST))
    return f'{{ "type": "swtpm", "features": [ {features} ], "profiles": {{ {profiles}}}, "version": "{LEVEL}" }}'


def _profiles(engine: Engine) -> str:
    found: dict[str, Any] = json.loads(engine.info(INFO_PROFILES | INFO_ALGORITHMS | INFO_COMMANDS))
    members: dict[str, Any] = {"names": [profile["Name"] for profile in found["AvailableProfiles"]]}
    for name, source in (("algorithms", "RuntimeAlgorithms"), ("commands", "RuntimeCommands")):
        members[name] = {
            "canbedisabled": found[source]["CanBeDisabled"],
            "implemented": found[source]["Implemented"],
        }
    return json.dumps(members)[1:-1] + " "


def usage(program: str) -> str:
    """`swtpm --help`."""
    return f"""TPM 2.0 emulator with choice of interface.

Usage: {program} socket [options]
       {program} -v|--version

--help behind the interface prints its options.
"""


def socket_usage(program: str) -> str:
    """`swtpm socket --help`."""
    return f"""Usage: {program} socket [options]

The following options are supported:

-p|--port <port> : data channel on this TCP port of 127.0.0.1; each answer closes the connection
-f|--fd <fd>     : data channel on this connected socket; implies -t
-t|--terminate   : end when the data connection is gone
-d|--daemon      : go into the background when clients are served
--ctrl type=unixio,path=<path>[,mode=0...][,uid=<uid>][,gid=<gid>][,terminate]
--ctrl type=tcp,port=<port>[,bindaddr=<address>[,ifname=<interface>]][,terminate]
--ctrl type=unixio|tcp,fd=<listening socket>[,terminate]
--ctrl type=unixio,clientfd=<connected socket>[,terminate]
                 : control channel; terminate ends with its client;
                   mode of a UNIX socket is octal, 0770 by default
--server [type=tcp][,port=<port>[,bindaddr=<address>[,ifname=<interface>]]][,disconnect]
--server [type=tcp],fd=<connected socket>
--server type=unixio,path=<path>|fd=<listening socket>[,mode=0...][,uid=<uid>][,gid=<gid>][,disconnect]
                 : data channel; without port, TPM_PORT says which one;
                   disconnect closes the connection after each answer
--tpmstate dir=<dir>|backend-uri=dir://<dir>|backend-uri=file://<file>[,mode=0...][,lock][,backup][,fsync]
                 : where the state is (or TPM_PATH); mode of its files is octal, 0640 by default;
                   lock excludes other processes (default for a directory);
                   backup keeps the permanent state before the present one;
                   fsync changes nothing: what is acknowledged is on the disk
--key file=<path>|fd=<fd>[,format=hex|binary][,mode=aes-cbc|aes-256-cbc][,remove]
--key pwdfile=<path>|pwdfd=<fd>[,kdf=pbkdf2|sha512][,mode=aes-cbc|aes-256-cbc][,remove]
                 : encrypt the state with this key, or one made of this passphrase
--migration-key ...
                 : as --key, for the state that clients are given
--migration [incoming][,release-lock-outgoing]
                 : take the lock when the state arrives; give it up when it has left
--log file=<path>|fd=<fd>[,level=<n>][,prefix=<prefix>][,truncate]
                 : write messages there, not to stderr; the path - is nowhere;
                   from level 5 on libtpms writes, too
--pid file=<path>|fd=<fd>
                 : write the process id there when clients are served
--flags [not-need-init][,startup-clear|startup-state|startup-none][,disable-auto-shutdown]
                 : power the TPM on at once; send TPM2_Startup;
                   never send TPM2_Shutdown for a client
--locality [reject-locality-4][,allow-set-locality]
                 : refuse locality 4; let the data channel change the locality
--profile name=<name>|profile=<json>|file=<path>|fd=<fd>
                 : of a TPM that is made; needs libtpms 0.10
-r|--runas <user>: be this user
-R|--chroot <dir>: see nothing but what is below this directory
--tpm2           : needed: there is no TPM 1.2
--pcap file=<path>|fd=<fd>[,truncate][,mode=0...][,checksums]
                 : write commands and responses into a pcapng file, for Wireshark;
                   its mode is octal, 0640 by default
--seccomp action=kill|log|none
                 : what becomes of system calls that are not needed once clients are served:
                   they end the program or fail (default), are logged, or done
--print-capabilities
                 : print what this program can do and end
--print-states   : print what lies at --tpmstate and end
--print-profiles : print the profiles of libtpms and end
--print-info <n> : print what libtpms says of itself and the TPM and end
-h|--help        : print this and end
"""
