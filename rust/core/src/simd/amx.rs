//! AMX: tiles of sixteen rows of 64 bytes, and the product of two of them in bfloat16.
//!
//! The instructions are written in assembly, because the standard library has no stable names for them.
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

use half::bf16;

use super::avx512::Avx512;
use super::dots::{Dots, PAIRS, SIDE, STEP};

/// Rows of a tile, and float32 columns.
const TILE: usize = 16;

/// Proof that this machine has AMX with bfloat16, that the system saves its registers and that this process
/// may use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amx(Avx512);

impl Amx {
    /// The proof, if the machine has the instructions and the system permits them.
    pub fn detect() -> Option<Self> {
        let avx512 = Avx512::detect()?;
        (has_instructions() && is_permitted()).then_some(Self(avx512))
    }
}

fn has_instructions() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 0b11 << 17;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    // SAFETY: OSXSAVE says that `xgetbv` exists and is enabled.
    let saved = unsafe { _xgetbv(0) };
    features & BF16 != 0 && features & TILE != 0 && saved & TILE_STATE == TILE_STATE
}

/// Asks Linux for the tile registers, which a process gets on request only. It may refuse, for example where a
/// signal stack is too small for them.
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call changes nothing but the permission of this process, and takes no pointer.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// The layout of `ldtilecfg` and `sttilecfg`.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// Tiles unused, as a thread starts.
    const NONE: Self = Self { palette: 0, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };

    /// All eight tiles at their full size.
    const FULL: Self = {
        let mut full = Self { palette: 1, ..Self::NONE };
        let mut i = 0;
        while i < 8 {
            full.row_bytes[i] = 64;
            full.rows[i] = TILE as u8;
            i += 1;
        }
        full
    };
}

/// The configuration that a thread had before, which is its again when this is dropped: other code on the
/// thread may rely on its own.
struct Restore(Configuration);

impl Restore {
    fn configure(_proof: Amx) -> Self {
        static FULL: Configuration = Configuration::FULL;
        let mut before = Self(Configuration::NONE);
        // SAFETY: `Amx` proves the instructions; both operands are 64 bytes of a `Configuration`. The compiler
        // uses no tile register, so none of its values is lost.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before.0, options(nostack, preserves_flags));
            asm!("ldtilecfg [{}]", in(reg) &raw const FULL, options(nostack, preserves_flags));
        }
        before
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        // SAFETY: as in `configure`; `sttilecfg` wrote what `ldtilecfg` reads, and palette 0 releases the tiles.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const self.0, options(nostack, preserves_flags)) }
    }
}

impl Dots for Amx {
    type Base = Avx512;

    #[inline(always)]
    fn base(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn prepared<R>(self, work: impl FnOnce() -> R) -> R {
        let _before = Restore::configure(self);
        work()
    }

    #[inline(always)]
    fn multiply(self, left: &[bf16], stride: usize, panel: &[bf16], width: usize, acc: &mut [f32], add: bool) {
        let steps = panel.len() / (width * STEP);
        assert!(width == SIDE || width == TILE, "a panel is one or two tiles wide");
        assert!(panel.len() == steps * width * STEP && acc.len() == SIDE * width, "whole steps");
        assert!(stride >= steps * STEP && left.len() >= SIDE * stride, "the sliver has the panel's depth");
        if steps == 0 {
            if !add {
                acc.fill(0.0);
            }
            return;
        }
        // SAFETY: `Amx` proves the instructions, and the caller is inside `prepared`, which gave every tile
        // sixteen rows of 64 bytes (were it not, the first instruction would trap, not misread). Reads of
        // `left`: rows 0..32 at `stride`, 64 bytes at each of `steps` steps; of `panel`: all of it; reads and
        // writes of `acc`: all of it. The assertions above hold those ranges inside the slices.
        unsafe {
            if width == SIDE {
                multiply_wide(steps, left.as_ptr(), stride, panel.as_ptr(), acc.as_mut_ptr(), add);
            } else {
                multiply_narrow(steps, left.as_ptr(), stride, panel.as_ptr(), acc.as_mut_ptr(), add);
            }
        }
    }
}

/// Four tiles of sums: 32 rows and 32 columns.
#[inline(always)]
unsafe fn multiply_wide(steps: usize, left: *const bf16, stride: usize, panel: *const bf16, acc: *mut f32, add: bool) {
    const ACC_ROW: usize = SIDE * size_of::<f32>();
    const PANEL_ROW: usize = SIDE * 2 * size_of::<bf16>();
    let left_stride = stride * size_of::<bf16>();
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "test {add:e}, {add:e}",
            "jz 3f",
            "tileloadd tmm0, [{acc} + {s}]",
            "tileloadd tmm1, [{acc} + {s} + 64]",
            "tileloadd tmm2, [{acc_low} + {s}]",
            "tileloadd tmm3, [{acc_low} + {s} + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{top} + {ls}]",
            "tileloadd tmm6, [{panel} + {s}]",
            "tileloadd tmm7, [{panel} + {s} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{low} + {ls}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {top}, 64",
            "add {low}, 64",
            "add {panel}, {step}",
            "dec {n}",
            "jnz 2b",
            "tilestored [{acc} + {s}], tmm0",
            "tilestored [{acc} + {s} + 64], tmm1",
            "tilestored [{acc_low} + {s}], tmm2",
            "tilestored [{acc_low} + {s} + 64], tmm3",
            add = in(reg) u32::from(add),
            acc = in(reg) acc,
            acc_low = in(reg) acc.add(TILE * SIDE),
            s = in(reg) ACC_ROW,
            ls = in(reg) left_stride,
            top = inout(reg) left => _,
            low = inout(reg) left.add(TILE * stride) => _,
            panel = inout(reg) panel => _,
            step = const PAIRS * PANEL_ROW,
            n = inout(reg) steps => _,
            options(nostack),
        );
    }
}

/// Two tiles of sums: 32 rows and 16 columns.
#[inline(always)]
unsafe fn multiply_narrow(
    steps: usize,
    left: *const bf16,
    stride: usize,
    panel: *const bf16,
    acc: *mut f32,
    add: bool,
) {
    const ROW: usize = TILE * size_of::<f32>();
    let left_stride = stride * size_of::<bf16>();
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "test {add:e}, {add:e}",
            "jz 3f",
            "tileloadd tmm0, [{acc} + {s}]",
            "tileloadd tmm2, [{acc_low} + {s}]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm2",
            "2:",
            "tileloadd tmm4, [{top} + {ls}]",
            "tileloadd tmm6, [{panel} + {s}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{low} + {ls}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "add {top}, 64",
            "add {low}, 64",
            "add {panel}, {step}",
            "dec {n}",
            "jnz 2b",
            "tilestored [{acc} + {s}], tmm0",
            "tilestored [{acc_low} + {s}], tmm2",
            add = in(reg) u32::from(add),
            acc = in(reg) acc,
            acc_low = in(reg) acc.add(TILE * TILE),
            s = in(reg) ROW,
            ls = in(reg) left_stride,
            top = inout(reg) left => _,
            low = inout(reg) left.add(TILE * stride) => _,
            panel = inout(reg) panel => _,
            step = const PAIRS * ROW,
            n = inout(reg) steps => _,
            options(nostack),
        );
    }
}
