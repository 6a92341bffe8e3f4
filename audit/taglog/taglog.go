// Package taglog turns a sequence of records into a Merkle tree that can be
// signed, tiled and proven. It keeps nothing: hashes are read and written
// through the caller's transaction.
//
// The tree is RFC 6962's. Formats are those of C2SP: tlog-tiles for tiles and
// entries, tlog-checkpoint and signed-note for signed trees, tlog-proof for
// proofs of inclusion.
package taglog

import (
	"errors"
	"fmt"
	"strings"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// MaxRecord bounds a record in bytes: c2sp.org/tlog-tiles gives its length 16 bits.
const MaxRecord = 1<<16 - 1

// Append returns the hashes to store when record becomes entry n, and the tree
// with that entry in it. The hashes go to the consecutive indexes that start at
// tlog.StoredHashIndex(0, n), in the transaction that stores the record itself:
// a log that can lag behind its records is a log that can lose them.
func Append(n int64, record []byte, old tlog.HashReader) ([]tlog.Hash, tlog.Tree, error) {
	if len(record) > MaxRecord {
		return nil, tlog.Tree{}, fmt.Errorf("record %d has %d bytes, more than %d", n, len(record), MaxRecord)
	}
	hashes, err := tlog.StoredHashes(n, record, old)
	if err != nil {
		return nil, tlog.Tree{}, err
	}
	first := tlog.StoredHashIndex(0, n)
	root, err := tlog.TreeHash(n+1, tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		var before, at []int64
		for i, x := range indexes {
			if x >= first {
				out[i] = hashes[x-first]
				continue
			}
			before, at = append(before, x), append(at, int64(i))
		}
		if len(before) == 0 {
			return out, nil
		}
		hs, err := old.ReadHashes(before)
		if err != nil {
			return nil, err
		}
		for i, h := range hs {
			out[at[i]] = h
		}
		return out, nil
	}))
	return hashes, tlog.Tree{N: n + 1, Hash: root}, err
}

// ErrRoot reports hashes that do not make the tree they should.
var ErrRoot = errors.New("the log has another root")

// Check tells whether the tree that hashes make of its first t.N entries is t.
func Check(t tlog.Tree, hashes tlog.HashReader) error {
	if t.N == 0 {
		return nil
	}
	root, err := tlog.TreeHash(t.N, hashes)
	if err != nil {
		return err
	}
	if root != t.Hash {
		return fmt.Errorf("%w: of the first %d entries it is %v, not %v", ErrRoot, t.N, root, t.Hash)
	}
	return nil
}

// Sign returns the checkpoint of tree (c2sp.org/tlog-checkpoint).
func Sign(origin string, tree tlog.Tree, signer note.Signer) ([]byte, error) {
	text := torchwood.Checkpoint{Origin: origin, Tree: tree}.String()
	return note.Sign(&note.Note{Text: text}, signer)
}

// ErrSignature reports a checkpoint that does not carry the signature it should.
var ErrSignature = errors.New("checkpoint is not signed by the log's key")

// Open returns the origin and tree of a signed checkpoint. The origin is the
// name of the key, as c2sp.org/tlog-checkpoint advises.
func Open(checkpoint []byte, verifier note.Verifier) (torchwood.Checkpoint, error) {
	policy := torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(verifier.Name()), torchwood.SingleVerifierPolicy(verifier))
	c, _, err := torchwood.VerifyCheckpoint(checkpoint, policy)
	if err != nil {
		return torchwood.Checkpoint{}, fmt.Errorf("%w: %w", ErrSignature, err)
	}
	return c, nil
}

// Parse reads a signed checkpoint without looking at its signature: what it says
// may be anybody's word.
func Parse(checkpoint []byte) (torchwood.Checkpoint, error) {
	text, _, ok := strings.Cut(string(checkpoint), "\n\n")
	if !ok {
		return torchwood.Checkpoint{}, errors.New("not a signed checkpoint")
	}
	return torchwood.ParseCheckpoint(text + "\n")
}

// Proof returns the proof that entry index is in the tree of a signed
// checkpoint (c2sp.org/tlog-proof).
func Proof(index int64, tree tlog.Tree, checkpoint []byte, hashes tlog.HashReader) ([]byte, error) {
	p, err := tlog.ProveRecord(tree.N, index, hashes)
	if err != nil {
		return nil, err
	}
	return torchwood.FormatProof(index, p, checkpoint), nil
}

// Tile returns the bytes of a tile of hashes (c2sp.org/tlog-tiles).
func Tile(t tlog.Tile, hashes tlog.HashReader) ([]byte, error) {
	return tlog.ReadTileData(t, hashes)
}

// Entries returns the bytes of an entry bundle (c2sp.org/tlog-tiles).
func Entries(records [][]byte) ([]byte, error) {
	var out []byte
	for _, r := range records {
		var err error
		if out, err = torchwood.AppendTileEntry(out, r); err != nil {
			return nil, err
		}
	}
	return out, nil
}
