//! The watch: its events do not depend on how the bytes are split, and no line fills the memory.
//!
//! The first byte is the number of following bytes that give the lengths of the pieces. 255 means none of them, and a
//! line without an end.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use fuzz::{bounded, shown};
use libfuzzer_sys::fuzz_target;
use rebase_agent::cluster::node::NodeObject;
use rebase_agent::cluster::{Api, ClusterError, Timing, fuzzing};
use rebase_agent::model::Fault;

static API: LazyLock<Api> = LazyLock::new(|| Api::new(PathBuf::new(), None, Timing::default()));

fn watch(chunks: &[&[u8]]) -> (Vec<NodeObject>, Result<(), ClusterError>) {
    let mut told = Vec::new();
    let ended = fuzzing::watch(chunks, &API, "n", &mut told);
    if let Err(error) = &ended {
        shown(&Fault::from(error).message, 500);
    }
    (told, ended)
}

fn endless(text: &[u8]) {
    const PIECE: [u8; 700 << 10] = [b' '; 700 << 10];
    let (_, ended) = bounded(text.len() + 4 * PIECE.len(), 8, || watch(&[text, &PIECE, &PIECE, &PIECE]));
    assert!(ended.is_err());
}

fuzz_target!(|data: &[u8]| {
    let Some((count, data)) = data.split_first() else { return };
    if *count == 255 {
        return endless(data);
    }
    let (lengths, text) = data.split_at(data.len().min(usize::from(*count)));
    let (mut chunks, mut rest) = (Vec::new(), text);
    for length in lengths {
        let (chunk, after) = rest.split_at(rest.len().min(usize::from(*length)));
        chunks.push(chunk);
        rest = after;
    }
    chunks.push(rest);
    let (whole, whole_ended) = bounded(text.len(), 256, || watch(&[text]));
    let (pieces, pieces_ended) = bounded(text.len(), 256, || watch(&chunks));
    assert_eq!(whole_ended.map_err(|e| e.to_string()), pieces_ended.map_err(|e| e.to_string()));
    assert_eq!(whole.len(), pieces.len());
    for (one, other) in whole.iter().zip(&pieces) {
        assert_eq!((&one.facts, &one.uid, &one.resource_version), (&other.facts, &other.uid, &other.resource_version));
        assert_eq!(one.facts.name, "n");
    }
});
