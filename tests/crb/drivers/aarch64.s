// A CRB driver for AArch64 that reads registers by pairs (LDP), single words and bytes.
// x0: page of a locality (read as memory, written as MMIO); x1: command, x2: its length;
// x3: where the response goes. Leaves its length in x0, and in x4 to x7 what LDP read of 0x30 to 0x4f.
    mov  w9, #1
    str  w9, [x0, #0x08]        // LOC_CTRL.requestAccess
1:  ldrb w9, [x0, #0x0c]        // LOC_STS.Granted
    tbz  w9, #0, 1b
    ldp  x4, x5, [x0, #0x30]    // INTF_ID and CTRL_EXT in one instruction
    mov  w9, #1
    str  w9, [x0, #0x40]        // CTRL_REQ.cmdReady
2:  ldp  x6, x7, [x0, #0x40]    // CTRL_REQ/STS and CANCEL/START
    tbnz x6, #33, 2b            // tpmIdle
    ldr  x8, [x0, #0x68]        // CTRL_RSP_ADDR
    ldr  w10, [x0, #0x5c]       // CTRL_CMD_LADDR
    cmp  x8, x10
    b.ne fail
    mov  x11, #0
3:  cmp  x11, x2                // the command, byte by byte
    b.hs 4f
    ldrb w9, [x1, x11]
    add  x12, x10, x11
    strb w9, [x12]
    add  x11, x11, #1
    b    3b
4:  mov  w9, #1
    str  w9, [x0, #0x4c]        // CTRL_START
5:  ldr  w9, [x0, #0x4c]
    tbnz w9, #0, 5b
    ldr  w9, [x8, #2]           // size of the response, misaligned and big-endian
    rev  w13, w9
    mov  x11, #0
6:  cmp  x11, x13               // the response, 16 bytes at a time
    b.hs 7f
    add  x12, x8, x11
    ldp  x14, x15, [x12]
    add  x12, x3, x11
    stp  x14, x15, [x12]
    add  x11, x11, #16
    b    6b
7:  mov  w9, #2
    strb w9, [x0, #0x40]        // CTRL_REQ.goIdle, as a byte
    strh w9, [x0, #0x08]        // LOC_CTRL.relinquish, as two
    mov  x0, x13
    b    done
fail:
    mov  x0, #0
done:
    nop
