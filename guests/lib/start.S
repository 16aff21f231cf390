/*
 * Where a guest begins: the ELF notes by which the domain builder knows a PV kernel, the entry
 * point, and the hypercall in both of its conventions.
 *
 * The notes are those of Xen's public elfnote.h. Built with HYPERCALL_PAGE defined, the kernel asks
 * for a page of hypercall stubs and calls them (32 bytes each, one a number); without, it executes
 * SYSCALL itself, which traps to the hypervisor as long as the guest is in kernel mode.
 */

#ifdef MINI
#define NOTE_FLAGS ""
#else
#define NOTE_FLAGS "a"
#endif
#define NOTE(type, ...)                 \
    .pushsection .note.xen, NOTE_FLAGS, @note; \
    .balign 4;                          \
    .long 4, 2f - 1f, type;             \
    .asciz "Xen";                       \
1:  __VA_ARGS__;                        \
2:  .balign 4;                          \
    .popsection

#define ELFNOTE_ENTRY 1
#define ELFNOTE_HYPERCALL_PAGE 2
#define ELFNOTE_VIRT_BASE 3
#define ELFNOTE_PADDR_OFFSET 4
#define ELFNOTE_XEN_VERSION 5
#define ELFNOTE_GUEST_OS 6
#define ELFNOTE_LOADER 8
#define ELFNOTE_PAE_MODE 9
#define ELFNOTE_FEATURES 10

NOTE(ELFNOTE_GUEST_OS, .asciz "xenolith-guest")
NOTE(ELFNOTE_XEN_VERSION, .asciz "xen-3.0")
NOTE(ELFNOTE_LOADER, .asciz "generic")
#ifndef MINI /* the rest is what a builder assumes */
NOTE(ELFNOTE_PAE_MODE, .asciz "yes")
NOTE(ELFNOTE_FEATURES, .asciz "!writable_page_tables|pae_pgdir_above_4gb")
NOTE(ELFNOTE_VIRT_BASE, .quad virt_base)
NOTE(ELFNOTE_PADDR_OFFSET, .quad 0)
NOTE(ELFNOTE_ENTRY, .quad _start)
#endif
#ifdef HYPERCALL_PAGE
NOTE(ELFNOTE_HYPERCALL_PAGE, .quad hypercall_page)
#endif

    .text
    .globl _start
_start:
    cld
    mov %rsi, start_info(%rip)
    mov %rsp, builder_stack(%rip)
    lea boot_stack_top(%rip), %rsp
    xor %ebp, %ebp
    call guest_start
    ud2

/* long hypercall(long number, long a1, long a2, long a3, long a4, long a5) */
    .globl hypercall
hypercall:
    mov %rdi, %rax
    mov %rsi, %rdi
    mov %rdx, %rsi
    mov %rcx, %rdx
    mov %r8, %r10
    mov %r9, %r8
#ifdef HYPERCALL_PAGE
    mov %eax, %ecx
    shl $5, %ecx
    lea hypercall_page(%rip), %r11
    add %r11, %rcx
    call *%rcx
#else
    syscall
#endif
    ret

#ifdef HYPERCALL_PAGE
    /* Empty in the file: the domain builder has the hypervisor fill the page in. */
    .pushsection .bss.page, "aw", @nobits
    .balign 4096
    .globl hypercall_page
hypercall_page:
    .fill 4096
    .popsection
#endif

    .bss
    .balign 16
    .globl boot_stack
boot_stack:
    .fill 16384
boot_stack_top:
    .section .note.GNU-stack, "", @progbits
