//! The text of the kernels. A source is handed to the compiler as one piece, its own headers pasted in.

use std::collections::HashSet;
use std::fmt::Write;

use crate::{Error, Result};

/// A file below `cuda/`: its name and its text.
type File = (&'static str, &'static str);

/// Files by name.
macro_rules! files {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../../../cuda/", $name)))),*] };
}

/// The sources of the kernel table.
const SOURCES: &[File] = files![
    "dequantize.cu",
    "quantize.cu",
    "gemv_4bit.cu",
    "gemm_4bit.cu",
    "gemm_4bit_backward.cu",
    "lora.cu",
    "lora_add.cu",
    "fma.cu",
    "fma_lora.cu",
];

/// What they include.
const HEADERS: &[File] = files![
    "common/codebook.cuh",
    "common/decode.cuh",
    "common/dropout.cuh",
    "common/dtype.cuh",
    "common/epilogue.cuh",
    "common/fma_product.cuh",
    "common/gemm.cuh",
    "common/lora_tile.cuh",
    "common/matrix.cuh",
    "common/mma.cuh",
    "common/ptx.cuh",
    "common/reduce.cuh",
    "common/scales.cuh",
    "common/split.cuh",
    "common/tile.cuh",
    "common/vec.cuh",
];

/// The names of the sources.
pub fn names() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().map(|(name, _)| *name)
}

/// A source with each of our headers in the place of its first `#include "…"`, and lines numbered as in the files.
///
/// # Errors
/// [`Error::Unknown`] for a name that is no source.
pub fn source(name: &str) -> Result<String> {
    let file = SOURCES.iter().find(|(known, _)| *known == name).ok_or_else(|| Error::Unknown {
        what: "source",
        allowed: names().collect::<Vec<_>>().join(", "),
        got: format!("{name:?}"),
    })?;
    let mut out = String::new();
    paste(*file, &mut HashSet::new(), &mut out);
    Ok(out)
}

fn paste((name, body): File, seen: &mut HashSet<&'static str>, out: &mut String) {
    seen.insert(name);
    let _ = writeln!(out, "#line 1 \"{name}\"");
    for (number, line) in body.lines().enumerate() {
        match included(name, line) {
            Some(header) if seen.contains(header.0) => out.push('\n'),
            Some(header) => {
                paste(header, seen, out);
                let _ = writeln!(out, "#line {} \"{name}\"", number + 2);
            }
            None if line.trim() == "#pragma once" => out.push('\n'),
            // A header of the test host stays: it stands in a branch that NVRTC does not take.
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
}

/// Our header that a line of the file `name` includes, by its path from there or from `cuda/`.
fn included(name: &str, line: &str) -> Option<File> {
    let path = line.trim().strip_prefix("#include \"")?.split('"').next()?;
    let beside = name.rsplit_once('/').map(|(folder, _)| format!("{folder}/{path}"));
    let find = |path: &str| HEADERS.iter().find(|(known, _)| *known == path).copied();
    beside.and_then(|path| find(&path)).or_else(|| find(path))
}

#[cfg(test)]
mod tests {
    use super::{HEADERS, SOURCES, source};
    use crate::kernels::{Kind, Parameter, Row, TABLE};

    /// Name and declared type of each parameter of an entry, read out of its source.
    fn declared(row: &Row) -> Option<Vec<(String, Kind)>> {
        let (_, text) = SOURCES.iter().find(|(name, _)| *name == row.file)?;
        let mut heads = text.split("FL_KERNEL(").skip(1).filter_map(|rest| rest.split_once(')'));
        let list = heads.find_map(|(_, head)| head.trim_start().strip_prefix(row.entry)?.strip_prefix('('))?;
        let parameter = |text: &str| {
            let (kind, name) = text.trim().rsplit_once([' ', '*']).expect("a type and a name");
            let kind = match kind.trim() {
                _ if text.contains('*') => Kind::Pointer,
                "i64" => Kind::I64,
                "u32" => Kind::U32,
                "float" => Kind::F32,
                other => panic!("{}: {other} {name}", row.entry),
            };
            (name.to_owned(), kind)
        };
        Some(list.split_once(')')?.0.split(',').map(parameter).collect())
    }

    #[test]
    fn the_table_says_of_every_entry_what_its_source_declares() {
        for row in &TABLE {
            let found = declared(row).unwrap_or_else(|| panic!("{} has no entry {}", row.file, row.entry));
            let expected: Vec<_> =
                row.parameters.iter().map(|Parameter { name, kind }| ((*name).to_owned(), *kind)).collect();
            assert_eq!(found, expected, "{}", row.entry);
        }
    }

    #[test]
    fn a_source_reads_no_macro_that_its_rows_do_not_list() {
        const NOT_CONSTANTS: [&str; 6] =
            ["FL_KERNEL", "FL_DEVICE", "FL_DEVICE_CONSTEXPR", "FL_SHARED", "FL_TABLE", "FL_ARCH"];
        for (file, text) in SOURCES {
            let rows: Vec<_> = TABLE.iter().filter(|row| row.file == *file).collect();
            let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for word in words.filter(|word| word.starts_with("FL_") && !NOT_CONSTANTS.contains(word)) {
                assert!(rows.iter().any(|row| row.constants.contains(&word)), "{file}: {word}");
            }
        }
    }

    #[test]
    fn every_file_of_the_folder_is_embedded() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../cuda");
        let names = |sub: &str| -> Vec<String> {
            let entries = std::fs::read_dir(format!("{folder}/{sub}")).expect("the folder of the sources");
            let path = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("readable").file_name();
            let mut found: Vec<_> = entries.map(|entry| path(entry).to_string_lossy().into_owned()).collect();
            found.retain(|name| name.contains(".cu"));
            found.sort();
            found
        };
        let embedded = |files: &[super::File]| {
            let mut known: Vec<_> =
                files.iter().map(|(name, _)| (*name).trim_start_matches("common/").to_owned()).collect();
            known.sort();
            known
        };
        assert_eq!(names(""), embedded(SOURCES));
        assert_eq!(names("common"), embedded(HEADERS));
    }

    #[test]
    fn a_pasted_source_holds_each_header_once_and_includes_none_of_ours() {
        for (name, _) in SOURCES {
            let pasted = source(name).expect("a source");
            for (header, text) in HEADERS {
                let marker = format!("#line 1 \"{header}\"");
                assert!(pasted.matches(&marker).count() <= 1, "{name}: {header}");
                assert!(!text.contains("#include <"), "{header}: the compiler is given no directory to look in");
            }
            let left = pasted.lines().find(|line| line.trim().starts_with("#include \"") && !line.contains("host/"));
            assert_eq!(left, None, "{name}");
        }
    }

    #[test]
    fn lines_are_numbered_as_in_the_files() {
        let (name, text) = SOURCES[0];
        let pasted = source(name).expect("a source");
        let last = text.lines().last().expect("lines");
        let after = pasted.rsplit_once(&format!(" \"{name}\"\n")).expect("a marker").1;
        let marker = pasted.lines().rfind(|line| line.ends_with(&format!(" \"{name}\""))).expect("a marker");
        let first: usize = marker.split(' ').nth(1).expect("a number").parse().expect("a number");
        assert_eq!(first + after.lines().count() - 1, text.lines().count());
        assert_eq!(pasted.lines().last(), Some(last));
    }

    #[test]
    fn an_unknown_source_lists_the_known_ones() {
        let error = source("gemm.cu").expect_err("no such file").to_string();
        assert!(error.contains("dequantize.cu") && error.contains("\"gemm.cu\""), "{error}");
    }
}
