//! The smallest guest: an ELF file that Cloud Hypervisor boots through PVH, and that halts.

/// Where it is loaded and entered. Above 1 MiB, where CH's own tables end.
const ENTRY: u32 = 0x20_0000;

/// 32-bit code. Interrupts stay off, so the vCPU sleeps in the kernel until it is kicked.
const CODE: &[u8] = &[
    0xfa, // cli
    0xf4, // hlt
    0xeb, 0xfd, // jmp to hlt (2 + 2 - 3 bytes back)
];

const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The file: header, two program headers, the note, the code.
pub(crate) fn halting_guest() -> Vec<u8> {
    let note = note();
    let note_at = EHDR_BYTES + 2 * PHDR_BYTES;
    let code_at = note_at + note.len();
    let mut file = elf_header();
    file.extend(program_header(PT_LOAD, code_at, ENTRY, CODE.len()));
    file.extend(program_header(PT_NOTE, note_at, 0, note.len()));
    file.extend(note);
    file.extend(CODE);
    file
}

/// `Elf64_Ehdr` (uapi/linux/elf.h).
fn elf_header() -> Vec<u8> {
    let mut header = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header.extend(2_u16.to_le_bytes()); // e_type: ET_EXEC
    header.extend(62_u16.to_le_bytes()); // e_machine: EM_X86_64
    header.extend(1_u32.to_le_bytes()); // e_version
    header.extend(u64::from(ENTRY).to_le_bytes()); // e_entry
    header.extend(64_u64.to_le_bytes()); // e_phoff: right behind this header
    header.extend(0_u64.to_le_bytes()); // e_shoff: no sections
    header.extend(0_u32.to_le_bytes()); // e_flags
    for half in [64_u16, 56, 2, 64, 0, 0] {
        header.extend(half.to_le_bytes()); // e_ehsize, e_phentsize, e_phnum, e_sh*
    }
    assert_eq!(header.len(), EHDR_BYTES);
    header
}

/// `Elf64_Phdr`.
fn program_header(kind: u32, offset: usize, address: u32, bytes: usize) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(kind.to_le_bytes());
    header.extend(5_u32.to_le_bytes()); // readable, executable
    header.extend((offset as u64).to_le_bytes());
    header.extend(u64::from(address).to_le_bytes()); // virtual
    header.extend(u64::from(address).to_le_bytes()); // physical
    header.extend((bytes as u64).to_le_bytes()); // in the file
    header.extend((bytes as u64).to_le_bytes()); // in memory
    header.extend(4_u64.to_le_bytes()); // alignment
    assert_eq!(header.len(), PHDR_BYTES);
    header
}

/// `XEN_ELFNOTE_PHYS32_ENTRY`: where to enter, in 32-bit protected mode
/// (xen/include/public/elfnote.h).
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    note.extend(4_u32.to_le_bytes()); // bytes of the name
    note.extend(8_u32.to_le_bytes()); // bytes of the address
    note.extend(18_u32.to_le_bytes()); // XEN_ELFNOTE_PHYS32_ENTRY
    note.extend(b"Xen\0");
    note.extend(u64::from(ENTRY).to_le_bytes());
    note
}
