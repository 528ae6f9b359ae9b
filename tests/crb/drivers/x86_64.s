# A CRB driver for x86-64 that reads registers by 16, 8, 4 and 1 bytes.
# rdi: page of a locality; rsi: command; rdx: its length; r8: where the response goes. Leaves its length in rax, and in
# xmm0 what MOVDQU read of 0x30 to 0x3f.
    movl $1, 0x08(%rdi)
1:  movzbl 0x0c(%rdi), %eax
    testb $1, %al
    jz 1b
    movdqu 0x30(%rdi), %xmm0
    movl $1, 0x40(%rdi)
2:  movq 0x44(%rdi), %rax
    testb $2, %al
    jnz 2b
    movq 0x68(%rdi), %rbx
    movl 0x5c(%rdi), %ecx
    cmpq %rbx, %rcx
    jne fail
    xorl %r9d, %r9d
3:  cmpq %rdx, %r9
    jae 4f
    movzbl (%rsi,%r9), %eax
    movb %al, (%rcx,%r9)
    incq %r9
    jmp 3b
4:  movb $1, 0x4c(%rdi)
5:  testl $1, 0x4c(%rdi)
    jnz 5b
    movl 2(%rbx), %eax
    bswapl %eax
    xorl %r9d, %r9d
6:  cmpq %rax, %r9
    jae 7f
    movdqu (%rbx,%r9), %xmm1
    movdqu %xmm1, (%r8,%r9)
    addq $16, %r9
    jmp 6b
7:  movw $2, 0x40(%rdi)
    movl $2, 0x08(%rdi)
    jmp done
fail:
    xorl %eax, %eax
done:
    nop
