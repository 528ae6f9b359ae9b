"""What tpm2-tools can do with a TPM, as a table of shell scripts with a check each.

The scripts run wherever there are a POSIX shell and tpm2-tools: on this machine against a daemon's sockets, and in the
guest against /dev/tpm0. Every script starts in an empty directory with nothing loaded, and needs nothing that another
one left.

No resource manager stands in between, and three loaded objects fill the TPM: the prelude's `tpm` makes room after every
tool.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

NOTHING_LEFT = "for kind in transient loaded-session saved-session; do tpm2_getcap handles-$kind; done"
"""Says nothing where a trial has left nothing in the TPM."""

Check = Callable[[str], None]
"""Raises AssertionError if what the script said is wrong. That the script succeeded is checked before."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One row: the script's lines run under `set -eu`, `check` judges what they said."""

    name: str
    lines: str
    check: Check

    @property
    def script(self) -> str:
        """The whole script, with its prelude; it makes and removes its own directory under TMPDIR or /tmp."""
        return f"{PRELUDE}\n{self.lines}"


PRELUDE = r"""
set -eu
work=$(mktemp -d)
cd "$work"
flush() { tpm2_flushcontext -t; }
# What succeeds has left nothing loaded; what fails must not take others with it.
finish() {
    status=$?
    cd /
    rm -rf "$work"
    if [ $status != 0 ]; then flush; tpm2_flushcontext -l; tpm2_flushcontext -s; fi
}
trap finish EXIT
# `tpm TOOL ...` runs a tool and empties the TPM's object slots: tools leave loaded what they loaded.
tpm() {
    code=0
    tpm2 "$@" || code=$?
    case "$*" in *.ctx*) flush ;; esac
    return $code
}
# The command fails with this TPM response code, and for no other reason.
refused() {
    wanted=$1; shift
    if "$@" >refusal 2>&1; then echo "NOT REFUSED: $*"; exit 90; fi
    if ! grep -qi "$wanted" refusal; then echo "REFUSED OTHERWISE: $*"; cat refusal; exit 91; fi
}
# A policy of the PCRs given, in the file given.
pcr_policy() {
    tpm2_startauthsession -Q -S trial.session
    tpm2_policypcr -Q -S trial.session -l "$1" -L "$2"
    tpm2_flushcontext trial.session
}
"""


def says(pattern: str) -> Check:
    """`pattern` (multi-line regular expression) is found in the output."""

    def check(text: str) -> None:
        assert re.search(pattern, text, re.MULTILINE), f"no {pattern!r} in\n{text}"

    return check


def succeeds(_text: str) -> None:
    """The script's success is all there is to check."""


def _random_bytes(text: str) -> None:
    one, two = text.split()
    assert len(one) == len(two) == 64
    assert one != two


def _counts_up(text: str) -> None:
    match = re.search(r"counted ([0-9a-f]{16})([0-9a-f]{16})$", text, re.MULTILINE)
    assert match, text
    assert int(match[2], 16) == int(match[1], 16) + 1


def _extended(digest: bytes, times: int) -> str:
    value = bytes(32)
    for _ in range(times):
        value = hashlib.sha256(value + digest).digest()
    return value.hex()


_EXTENDING = hashlib.sha256(b"crbd").hexdigest()
_ABC = hashlib.sha256(b"abc").hexdigest()

TRIALS = (
    # ---- what it is ----
    Trial("getcap-fixed", "tpm getcap properties-fixed", says(r'TPM2_PT_FAMILY_INDICATOR:\n.*\n\s+value: "2\.0"')),
    Trial("getcap-algorithms", "tpm getcap algorithms", says(r"^sha384:")),
    Trial("getcap-commands", "tpm getcap commands", says(r"^TPM2_CC_CreatePrimary:")),
    Trial("getcap-pcrs", "tpm getcap pcrs", says(r"sha256: \[ 0, 1, 2,.* 23 \]")),
    Trial("getcap-curves", "tpm getcap ecc-curves", says(r"TPM2_ECC_NIST_P384: 0x4")),
    Trial("selftest", "tpm selftest --fulltest; tpm gettestresult", says(r"status:\s+success")),
    Trial("readclock", "tpm readclock", says(r"^\s*time: [0-9]+")),
    Trial("testparms", "tpm testparms rsa2048; tpm testparms ecc384; tpm testparms aes256cfb", succeeds),
    # ---- random numbers and digests ----
    Trial("getrandom", "tpm getrandom --hex 32; echo; tpm getrandom --hex 32", _random_bytes),
    Trial("stirrandom", "echo 'much entropy' | tpm stirrandom", succeeds),
    Trial("hash", "printf abc >in; tpm hash -C n -g sha256 --hex in", says(f"^{_ABC}$")),
    Trial(
        "hash-sequence",
        # More than one command's worth: the tool uses a hash sequence.
        "head -c 20000 /dev/zero >in; tpm hash -C n -g sha256 --hex in",
        says(f"^{hashlib.sha256(bytes(20000)).hexdigest()}$"),
    ),
    Trial(
        "hmac",
        """
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        tpm create -Q -C parent.ctx -G hmac -u key.pub -r key.priv -c key.ctx
        printf abc >in
        tpm hmac --hex -c key.ctx in >one; tpm hmac --hex -c key.ctx in >two
        printf abd | tpm hmac --hex -c key.ctx >three
        cmp one two; if cmp -s one three; then exit 1; fi; cat one
        """,
        says(r"^[0-9a-f]{64}$"),
    ),
    # ---- PCRs ----
    Trial(
        "pcr-extend-twice",
        f"""
        tpm pcrreset 23; tpm pcrread sha256:23
        tpm pcrextend 23:sha256={_EXTENDING}; tpm pcrextend 23:sha256={_EXTENDING}; tpm pcrread sha256:23
        """,
        says(rf"(?si)23: 0x{'0' * 64}.*23: 0x{_extended(bytes.fromhex(_EXTENDING), 2)}"),
    ),
    Trial("pcr-reset-16", "tpm pcrreset 16; tpm pcrread sha256:16", says(rf"16: 0x{'0' * 64}")),
    Trial("pcr-reset-refused", "refused 0x907 tpm pcrreset 8", succeeds),
    Trial(
        "pcr-event",
        "tpm pcrreset 23; printf abc >event; tpm pcrevent -Q 23 event; tpm pcrread sha256:23",
        says(f"(?i)23: 0x{_extended(bytes.fromhex(_ABC), 1)}"),
    ),
    # ---- keys ----
    Trial("primary-rsa", "tpm createprimary -C o -G rsa2048 -c p.ctx", says(r"^\s+value: rsa$")),
    Trial("primary-ecc", "tpm createprimary -C o -G ecc384 -c p.ctx", says(r"curve-id:\n\s+value: NIST p384")),
    Trial(
        "primary-is-the-same",
        """
        tpm createprimary -Q -C o -G ecc -c one.ctx; tpm readpublic -Q -c one.ctx -o one.pub
        tpm createprimary -Q -C o -G ecc -c two.ctx; tpm readpublic -Q -c two.ctx -o two.pub
        tpm createprimary -Q -C e -G ecc -c three.ctx; tpm readpublic -Q -c three.ctx -o three.pub
        cmp one.pub two.pub; if cmp -s one.pub three.pub; then exit 1; fi
        """,
        succeeds,
    ),
    Trial(
        "sign-rsa",
        """
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        tpm create -Q -C parent.ctx -G rsa2048 -u key.pub -r key.priv
        tpm load -Q -C parent.ctx -u key.pub -r key.priv -c key.ctx
        echo message >m; echo forgery >f
        tpm sign -Q -c key.ctx -g sha256 -s rsapss -o sig m
        tpm verifysignature -Q -c key.ctx -g sha256 -s sig -m m
        refused 0x2db tpm verifysignature -Q -c key.ctx -g sha256 -s sig -m f
        """,
        succeeds,
    ),
    Trial(
        "sign-ecc",
        """
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        tpm create -Q -C parent.ctx -G ecc256 -p secret -u key.pub -r key.priv
        tpm load -Q -C parent.ctx -u key.pub -r key.priv -c key.ctx
        echo message >m; echo forgery >f
        refused 0x98e tpm sign -Q -c key.ctx -p wrong -g sha256 -o sig m
        tpm sign -Q -c key.ctx -p secret -g sha256 -o sig m
        tpm verifysignature -Q -c key.ctx -g sha256 -s sig -m m
        refused 0x2db tpm verifysignature -Q -c key.ctx -g sha256 -s sig -m f
        tpm dictionarylockout --clear-lockout
        """,
        succeeds,
    ),
    Trial(
        "encrypt-decrypt-aes",
        """
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        tpm create -Q -C parent.ctx -G aes128cfb -u key.pub -r key.priv -c key.ctx
        head -c 16 /dev/zero >iv; printf '%064d' 7 >plain
        tpm encryptdecrypt -Q -c key.ctx -t iv -o cipher plain
        if cmp -s plain cipher; then exit 1; fi
        tpm encryptdecrypt -Q -d -c key.ctx -t iv -o again cipher; cmp plain again
        """,
        succeeds,
    ),
    Trial(
        "encrypt-decrypt-rsa",
        """
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        tpm create -Q -C parent.ctx -G rsa2048 -u key.pub -r key.priv -c key.ctx
        echo message >m
        tpm rsaencrypt -c key.ctx -s oaep -o cipher m; tpm rsadecrypt -c key.ctx -s oaep -o again cipher; cmp m again
        """,
        succeeds,
    ),
    Trial(
        "ecdh",
        """
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        tpm create -Q -C parent.ctx -G ecc256:ecdh -u key.pub -r key.priv -c key.ctx
        tpm ecdhkeygen -u point -o secret -c key.ctx; tpm ecdhzgen -u point -o again -c key.ctx; cmp secret again
        # tpm2_ecdhzgen (5.4) leaves a session of its own loaded.
        tpm2_flushcontext -l
        """,
        succeeds,
    ),
    Trial(
        "object-changeauth",
        """
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        echo content | tpm create -Q -C parent.ctx -i- -p old -u key.pub -r key.priv -c key.ctx
        tpm changeauth -C parent.ctx -c key.ctx -p old -r new.priv new
        tpm load -Q -C parent.ctx -u key.pub -r new.priv -c new.ctx
        refused 0x98e tpm unseal -c new.ctx -p old
        tpm dictionarylockout --clear-lockout
        tpm unseal -c new.ctx -p new
        """,
        says("^content$"),
    ),
    Trial(
        "duplicate-import",
        """
        tpm createprimary -Q -C o -G ecc -c here.ctx; tpm createprimary -Q -C e -G ecc -c there.ctx
        tpm readpublic -Q -c there.ctx -o there.pub
        tpm startauthsession -S s; tpm policycommandcode -Q -S s -L policy TPM2_CC_Duplicate; tpm flushcontext s
        tpm create -Q -C here.ctx -G ecc256 -L policy -a 'sensitivedataorigin|userwithauth|sign' -u key.pub -r key.priv
        tpm load -Q -C here.ctx -u key.pub -r key.priv -c key.ctx
        tpm loadexternal -Q -C e -u there.pub -c target.ctx
        tpm startauthsession --policy-session -S s; tpm policycommandcode -Q -S s TPM2_CC_Duplicate
        tpm duplicate -C target.ctx -c key.ctx -G null -p session:s -r moved.priv -s moved.seed
        tpm flushcontext s; echo message >m; tpm sign -Q -c key.ctx -g sha256 -o sig m
        tpm import -Q -C there.ctx -u key.pub -i moved.priv -s moved.seed -r arrived.priv
        tpm load -Q -C there.ctx -u key.pub -r arrived.priv -c arrived.ctx
        tpm verifysignature -Q -c arrived.ctx -g sha256 -s sig -m m
        tpm sign -Q -c arrived.ctx -g sha256 -o second m
        """,
        succeeds,
    ),
    Trial(
        "evictcontrol",
        """
        tpm createprimary -Q -C o -G ecc -c key.ctx; tpm readpublic -Q -c key.ctx -o before.pub
        tpm evictcontrol -Q -C o -c key.ctx 0x81000042
        tpm getcap handles-persistent
        tpm readpublic -Q -c 0x81000042 -o after.pub; cmp before.pub after.pub
        tpm evictcontrol -Q -C o -c 0x81000042
        refused 0x18b tpm readpublic -Q -c 0x81000042
        """,
        says("0x81000042"),
    ),
    Trial(
        "context-save-load",
        """
        tpm2_createprimary -Q -C o -G ecc -c a.ctx; flush; tpm2_createprimary -Q -C e -G ecc -c b.ctx; flush
        tpm2_readpublic -Q -c a.ctx -n a.name; flush; tpm2_readpublic -Q -c b.ctx -n b.name
        tpm2_getcap handles-transient; flush; if cmp -s a.name b.name; then exit 1; fi
        """,
        says("^- 0x80000000$"),
    ),
    # ---- sessions and policies ----
    Trial(
        "sessions",
        """
        tpm startauthsession --hmac-session -S hmac; tpm startauthsession --policy-session -S policy
        tpm getcap handles-saved-session; tpm flushcontext policy
        tpm sessionconfig --enable-encrypt hmac
        tpm getrandom -S hmac --hex 8
        tpm flushcontext hmac
        """,
        # The TPM lists saved sessions of both kinds with the prefix of HMAC sessions.
        says(r"^- 0x2000000\n- 0x2000001\n"),
    ),
    Trial(
        "seal-to-pcr",
        f"""
        tpm pcrreset 23; pcr_policy sha256:23 policy
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        echo content | tpm create -Q -C parent.ctx -i- -L policy -u key.pub -r key.priv -c key.ctx
        tpm unseal -c key.ctx -p pcr:sha256:23
        tpm pcrextend 23:sha256={_EXTENDING}
        refused 0x99d tpm unseal -c key.ctx -p pcr:sha256:23
        """,
        says("^content$"),
    ),
    Trial(
        "policy-secret-and-or",
        """
        tpm startauthsession -S s; tpm policysecret -Q -S s -c o -L one; tpm flushcontext s
        pcr_policy sha256:16 two
        tpm startauthsession -S s; tpm policyor -Q -S s -L both -l sha256:one,two; tpm flushcontext s
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        echo content | tpm create -Q -C parent.ctx -i- -L both -u key.pub -r key.priv -c key.ctx
        tpm startauthsession --policy-session -S s
        tpm policysecret -Q -S s -c o; tpm policyor -Q -S s -l sha256:one,two
        tpm unseal -c key.ctx -p session:s
        tpm flushcontext s
        """,
        says("^content$"),
    ),
    Trial(
        "quote",
        f"""
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        tpm create -Q -C parent.ctx -G ecc256:ecdsa:null -a \
            'fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign' -u ak.pub -r ak.priv -c ak.ctx
        tpm readpublic -Q -c ak.ctx -f pem -o ak.pem
        tpm pcrextend 23:sha256={_EXTENDING}
        tpm quote -Q -c ak.ctx -l sha256:0,16,23 -q 0badc0de -m msg -s sig -o pcrs -g sha256
        tpm checkquote -u ak.pem -m msg -s sig -f pcrs -g sha256 -q 0badc0de
        if tpm checkquote -u ak.pem -m msg -s sig -f pcrs -g sha256 -q 0badc0df 2>/dev/null; then exit 1; fi
        """,
        says("sig: "),
    ),
    Trial(
        "makecredential-activatecredential",
        """
        tpm createprimary -Q -C e -G ecc -c ek.ctx; tpm readpublic -Q -c ek.ctx -o ek.pub
        tpm createprimary -Q -C o -G ecc -c ak.ctx; tpm readpublic -Q -c ak.ctx -n ak.name
        echo credential >secret
        tpm makecredential -Q -T none -u ek.pub -s secret -n "$(od -An -v -tx1 ak.name | tr -d ' \\n')" -o blob
        tpm activatecredential -Q -c ak.ctx -C ek.ctx -i blob -o again; cmp secret again
        """,
        succeeds,
    ),
    Trial(
        "certify",
        """
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        tpm create -Q -C parent.ctx -G ecc256 -u key.pub -r key.priv -c key.ctx
        tpm certify -Q -c key.ctx -C key.ctx -g sha256 -o attest -s sig
        tpm verifysignature -Q -c key.ctx -g sha256 -s sig -m attest
        """,
        succeeds,
    ),
    # ---- NV ----
    Trial(
        "nv-ordinary",
        """
        tpm nvdefine -Q -C o -s 700 -a 'ownerread|ownerwrite|authread|authwrite' -p secret 0x1500042
        head -c 700 /dev/zero | tr '\\0' x >in
        tpm nvwrite -Q -C 0x1500042 -P secret -i in 0x1500042
        tpm nvread -C o -s 700 -o out 0x1500042; cmp in out
        tpm nvreadpublic 0x1500042
        tpm nvundefine -Q -C o 0x1500042
        refused 0x18b tpm nvread -C o 0x1500042
        """,
        says("size: 700"),
    ),
    Trial(
        "nv-counter",
        """
        tpm nvdefine -Q -C o -s 8 -a 'ownerread|ownerwrite|nt=counter' 0x1500043
        tpm nvincrement -Q -C o 0x1500043; tpm nvread -C o 0x1500043 | od -An -v -tx1 >one
        tpm nvincrement -Q -C o 0x1500043; tpm nvread -C o 0x1500043 | od -An -v -tx1 >two
        tpm nvundefine -Q -C o 0x1500043
        echo "counted $(cat one two | tr -d ' \\n')"
        """,
        _counts_up,
    ),
    Trial(
        "nv-extend",
        """
        tpm nvdefine -Q -C o -a 'ownerread|ownerwrite|nt=extend' 0x1500044
        printf abc >in; tpm nvextend -Q -C o -i in 0x1500044
        tpm nvread -C o 0x1500044 | od -An -v -tx1 | tr -d ' \\n'; tpm nvundefine -Q -C o 0x1500044
        """,
        says(_extended(b"abc", 1)),
    ),
    Trial(
        "nv-bits",
        """
        tpm nvdefine -Q -C o -s 8 -a 'ownerread|ownerwrite|nt=bits' 0x1500045
        tpm nvsetbits -Q -C o -i 0x5 0x1500045; tpm nvsetbits -Q -C o -i 0x8 0x1500045
        tpm nvread -C o 0x1500045 | od -An -v -tx1 | tr -d ' \\n'; tpm nvundefine -Q -C o 0x1500045
        """,
        says("000000000000000d"),
    ),
    Trial(
        "nv-write-lock",
        """
        tpm nvdefine -Q -C o -s 4 -a 'ownerread|ownerwrite|write_stclear' 0x1500046
        printf abcd | tpm nvwrite -Q -C o -i- 0x1500046; tpm nvwritelock -C o 0x1500046
        printf efgh >in; refused 0x148 tpm nvwrite -C o -i in 0x1500046
        tpm nvread -C o 0x1500046; echo; tpm nvundefine -Q -C o 0x1500046
        """,
        says("^abcd$"),
    ),
    # ---- hierarchies ----
    Trial(
        "owner-changeauth",
        """
        tpm changeauth -c owner first; refused 0x9a2 tpm createprimary -Q -C o -G ecc -c p.ctx
        tpm createprimary -Q -C o -P first -G ecc -c p.ctx
        tpm changeauth -c owner -p first second; tpm changeauth -c owner -p second
        tpm createprimary -Q -C o -G ecc -c p.ctx
        """,
        succeeds,
    ),
    Trial(
        "dictionary-lockout",
        """
        tpm dictionarylockout --setup-parameters --max-tries=3 --recovery-time=1000 --lockout-recovery-time=1000
        tpm createprimary -Q -C o -G ecc -c parent.ctx
        echo content | tpm create -Q -C parent.ctx -i- -p secret -u key.pub -r key.priv -c key.ctx
        for try in 1 2 3; do refused 0x98e tpm unseal -c key.ctx -p wrong; done
        refused 0x921 tpm unseal -c key.ctx -p secret
        tpm getcap properties-variable
        tpm dictionarylockout --clear-lockout
        tpm unseal -c key.ctx -p secret
        tpm dictionarylockout --setup-parameters --max-tries=32 --recovery-time=1000 --lockout-recovery-time=1000
        """,
        says(r"(?s)inLockout:\s+1.*TPM2_PT_LOCKOUT_COUNTER: 0x3$.*^content$"),
    ),
    Trial(
        "clear",
        """
        tpm createprimary -Q -C o -G ecc -c p.ctx; tpm readpublic -Q -c p.ctx -o before.pub
        tpm evictcontrol -Q -C o -c p.ctx 0x81000043
        tpm clear -c l
        refused 0x18b tpm readpublic -Q -c 0x81000043
        tpm createprimary -Q -C o -G ecc -c p.ctx; tpm readpublic -Q -c p.ctx -o after.pub
        if cmp -s before.pub after.pub; then exit 1; fi
        """,
        succeeds,
    ),
    # Last, because only the platform could allow it again, and firmware keeps the platform's authorization to itself.
    Trial("clear-forbidden", "tpm clearcontrol -C l s; refused 0x120 tpm clear -c l", succeeds),
)
