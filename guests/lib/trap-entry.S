/*
 * Trap entries. The frame that Xen builds ("bounces") is, from low to high addresses: rcx, r11,
 * [error code], rip, cs | saved upcall mask << 32, rflags, rsp, ss (arch-x86/xen-x86_64.h). An entry
 * turns it into a struct regs, calls trap(), and returns by the iret hypercall, whose frame is
 * rax, r11, rcx, flags, rip, cs, rflags, rsp, ss; by the hypercall page, flags, rip, cs ...
 */
#define HC_iret 23

    .section .text.trap_entry, "ax", @progbits

.macro TRAP_ENTRY vector, error_code
    .globl trap_\vector
trap_\vector:
    pop %rcx
    pop %r11
    .if !\error_code
    push $0
    .endif
    push %rcx
    push %r11
    push %rax
    mov $\vector, %eax
    jmp trap_common
.endm

    .irp vector, 0, 1, 2, 3, 4, 5, 6, 7, 9, 15, 16, 18, 19, 0x21, 0x42, 0x80, 256, 258, 259
    TRAP_ENTRY \vector, 0
    .endr
    .irp vector, 8, 10, 11, 12, 13, 14, 17
    TRAP_ENTRY \vector, 1
    .endr

trap_common:
    push %rax
    push %rbx
    push %rdx
    push %rsi
    push %rdi
    push %rbp
    push %r8
    push %r9
    push %r10
    push %r12
    push %r13
    push %r14
    push %r15
    pushf
    pop entry_rflags(%rip)
    mov shared_info(%rip), %rbx
    movzbl 1(%rbx), %ebx
    mov %rbx, entry_upcall_mask(%rip)
    cld
    mov %rsp, %rdi
    testb $3, 18*8(%rsp) /* cs: RPL 3 only when it was user mode that trapped */
    jnz left_user_mode
    mov %rsp, %rbx
    and $~15, %rsp
    call trap
    mov %rbx, %rsp
return_by_iret:
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r10
    pop %r9
    pop %r8
    pop %rbp
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rbx
    add $8, %rsp          /* the vector */
    movq $0, 24(%rsp)     /* no flags: everything is restored */
#ifdef HYPERCALL_PAGE
    pop %rax              /* the page's stub pushes these three itself */
    pop %r11
    pop %rcx
    jmp hypercall_page + HC_iret * 32
#else
    mov $HC_iret, %eax
    syscall
#endif
    ud2

/*
 * void run_user(struct regs *regs): run user mode from this state until it traps; then `regs` holds
 * the state it trapped in. The trap arrives on the stack set by stack_switch, of which we need
 * nothing but the frame.
 */
    .globl run_user
run_user:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    push %rdi
    mov %rsp, run_user_rsp(%rip)
    sub $REGS_BYTES, %rsp
    mov %rdi, %rsi
    mov %rsp, %rdi
    mov $REGS_BYTES/8, %ecx
    rep movsq
    jmp return_by_iret
left_user_mode:
    mov %rsp, %rsi
    mov run_user_rsp(%rip), %rsp
    pop %rdi
    mov $REGS_BYTES/8, %ecx
    rep movsq
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

/*
 * long iret_raw(u64 frame[9]): issue the iret hypercall on this very frame. Returns 0 when the
 * frame led to iret_raw_landed, or 1 when it led to a fault and the handler to iret_raw_faulted.
 */
    .globl iret_raw
iret_raw:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, iret_raw_rsp(%rip)
    mov %rdi, %rsp
    mov $HC_iret, %eax
    syscall
    ud2
    .globl iret_raw_landed
iret_raw_landed:
    mov %rsp, iret_landed_rsp(%rip)
    mov %rax, iret_landed_rax(%rip)
    mov %rcx, iret_landed_rcx(%rip)
    mov %r11, iret_landed_r11(%rip)
    mov iret_raw_rsp(%rip), %rsp
    pushf
    pop iret_landed_rflags(%rip)
    xor %eax, %eax
    jmp 9f
    .globl iret_raw_faulted
iret_raw_faulted:
    mov iret_raw_rsp(%rip), %rsp
    mov $1, %eax
9:  pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    cld
    ret

/* A look at a bounce frame as it arrives: vector 6 (#UD) may be sent here instead of to trap_6. */
    .globl trap_6_raw
trap_6_raw:
    mov %rsp, raw_rsp(%rip)
    push %rsi
    push %rdi
    push %rcx
    pushf
    lea 32(%rsp), %rsi
    lea raw_frame(%rip), %rdi
    mov $7, %ecx
    cld
    rep movsq
    popf
    pop %rcx
    pop %rdi
    pop %rsi
    mov %cs, raw_cs(%rip)
    mov %ss, raw_ss(%rip)
    jmp trap_6

    .set REGS_BYTES, 22 * 8
    .bss
    .balign 8
    .irp name, run_user_rsp, iret_raw_rsp, iret_landed_rsp, iret_landed_rax, iret_landed_rcx, iret_landed_r11, \
               iret_landed_rflags, entry_rflags, entry_upcall_mask, \
               raw_rsp, raw_cs, raw_ss
    .globl \name
\name: .quad 0
    .endr
    .globl raw_frame
raw_frame: .fill 7, 8
    .section .note.GNU-stack, "", @progbits
