// What the SSDT for slot 3.0/10.0 is to mean, in ASL. iasl makes the same bytes of it, but for the External in front, and for
// the names X18 and X80: it does not let one ask for S18 and S80 before they are made.
DefinitionBlock ("", "SSDT", 2, "CRBD  ", "CRBDTPM ", 1)
{
    External (\_SB.PCI0, DeviceObj)
    External (\_SB.PCI0.X18, DeviceObj)
    External (\_SB.PCI0.X18.X80, DeviceObj)

    If (!CondRefOf (\_SB.PCI0.X18))
    {
        Scope (\_SB.PCI0)
        {
            Device (S18) { Name (_ADR, 0x00030000) }
        }
    }
    If (!CondRefOf (\_SB.PCI0.X18.X80))
    {
        Scope (\_SB.PCI0.S18)
        {
            Device (S80) { Name (_ADR, 0x00100000) }
        }
    }
    Scope (\_SB.PCI0.S18.S80)
    {
        OperationRegion (TPCI, PCI_Config, Zero, 0x14)
        Field (TPCI, DWordAcc, NoLock, Preserve) { TIDS, 32, Offset (0x10), TBAR, 32 }
        Field (TPCI, WordAcc, NoLock, Preserve) { , 33, TMEM, 1 }
        Device (TPM)
        {
            Name (_HID, "MSFT0101")
            Name (_UID, One)
            Name (_STR, Unicode ("TPM 2.0 Device"))
            Name (_DEP, Package () { \_SB.PCI0 })
            Name (TFND, Zero)
            DataTableRegion (TTAB, "TPM2", "", "")
            Field (TTAB, ByteAcc, NoLock, Preserve) { Offset (9), TSUM, 8, Offset (40), TCTL, 32 }
            Method (_STA, 0, NotSerialized)
            {
                If (TIDS == 0x0002C4BD)
                {
                    TFND = One
                    Return (0x0F)
                }
                Return (Zero)
            }
            Method (TADD, 1, NotSerialized)
            {
                Local0 = Arg0
                Local0 = Local0 + (Arg0 >> 8)
                Local0 = Local0 + (Arg0 >> 16)
                Local0 = Local0 + (Arg0 >> 24)
                Return (Local0)
            }
            Method (_CRS, 0, Serialized)
            {
                Name (TRES, ResourceTemplate () { Memory32Fixed (ReadWrite, 0x00000000, 0x00002000, ) })
                CreateDWordField (TRES, 4, TADR)
                Local0 = Zero
                If (TFND) { And (TBAR, 0xFFFFFFF0, Local0) }
                TADR = Local0
                If (Local0)
                {
                    TMEM = One
                    Local1 = Local0 + 0x40
                    Local2 = TSUM + TADD (TCTL)
                    TSUM = Local2 - TADD (Local1)
                    TCTL = Local1
                }
                Return (TRES)
            }
        }
    }
}
