// A machine's own table, as small as can be; with NAMED it names the PCI device, as QEMU's do. SETI and SETB write what the
// device has in config space: its ids, and BAR 0.
DefinitionBlock ("", "DSDT", 1, "CRBD  ", "CRBDTEST", 1)
{
    External (\_SB.PCI0.S80.TIDS, FieldUnitObj)
    External (\_SB.PCI0.S80.TBAR, FieldUnitObj)

    Scope (\_SB)
    {
        Device (PCI0)
        {
            Name (_HID, EisaId ("PNP0A08"))
            Name (_BBN, 0)
#ifdef NAMED
            Device (S80) { Name (_ADR, 0x00100000) }
#endif
        }
    }
    Method (SETI, 1) { \_SB.PCI0.S80.TIDS = Arg0 }
    Method (SETB, 1) { \_SB.PCI0.S80.TBAR = Arg0 }
}
