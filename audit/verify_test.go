package audit_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/sqlite"
	"tidemark/audit/taglog"
)

// storeTiles are the tiles of a store.
func storeTiles(s *sqlite.Store) audit.Tiles { return audit.Tiles{Hashes: s, Leaves: s} }

// A forger changes an entry.
type forger struct {
	*sqlite.Store
	index int64
	make  func(leaf []byte) []byte
}

func (f forger) Leaves(ctx context.Context, start, n int64) ([][]byte, error) {
	leaves, err := f.Store.Leaves(ctx, start, n)
	if i := f.index - start; err == nil && i >= 0 && i < n {
		leaves[i] = f.make(leaves[i])
	}
	return leaves, err
}

// sign returns the checkpoint of all that is in the store.
func sign(t *testing.T, s *sqlite.Store, k *audit.Key) []byte {
	t.Helper()
	tree, err := s.Tree(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	note, err := taglog.Sign(k.Origin(), tree, k.Signer)
	if err != nil {
		t.Fatal(err)
	}
	return note
}

// A log that is what it should be verifies, over tiles that are full and
// partial, and against an earlier checkpoint.
func TestGoodLogVerifies(t *testing.T) {
	store, key := openStore(t, t.TempDir()), openKey(t, t.TempDir())
	var since []byte
	for i := range 600 {
		if i == 300 {
			since = sign(t, store, key)
		}
		ref := audittest.Ref(fmt.Sprint(i % 7))
		if _, err := audittest.Move(t.Context(), store, ref, fmt.Sprint(i), noon.Add(time.Duration(i)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	r, err := audit.Verify(t.Context(), storeTiles(store), sign(t, store, key), since, key.Verifier)
	if err != nil || len(r.Problems) > 0 || r.Size != 600 || r.Refs != 7 || r.Since != 300 {
		t.Errorf("report is %+v, %v", r, err)
	}
}

// What pulls are answered from is compared with the entries: a table that was
// changed behind their back is found, and the entry named that it contradicts.
func TestTableOfTagsIsCheckedAgainstTheLog(t *testing.T) {
	store, key := openStore(t, t.TempDir()), openKey(t, t.TempDir())
	for i := range 5 {
		for _, tag := range []string{"a", "b"} {
			if _, err := audittest.Move(t.Context(), store, audittest.Ref(tag), fmt.Sprint(tag, i), noon.Add(time.Duration(i)*time.Minute)); err != nil {
				t.Fatal(err)
			}
		}
	}
	checkpoint := sign(t, store, key)
	verify := func(change func(*audit.Tag) bool) []audit.Problem {
		t.Helper()
		r, err := audit.Verify(t.Context(), storeTiles(store), checkpoint, nil, key.Verifier)
		if err != nil || len(r.Problems) > 0 {
			t.Fatalf("report is %+v, %v", r, err)
		}
		err = r.CheckTags(func(yield func(audit.Tag, error) bool) {
			for tag, err := range store.EachTag(t.Context(), audit.TagQuery{}) {
				if tag.Ref == audittest.Ref("a") && !change(&tag) {
					continue
				}
				if !yield(tag, err) {
					return
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		return r.Problems
	}
	if got := verify(func(*audit.Tag) bool { return true }); len(got) > 0 {
		t.Errorf("a good table: %v", got)
	}
	bad := digest.FromString("bad")
	for _, tt := range []struct {
		name, want string
		change     func(*audit.Tag) bool
	}{
		{"another digest is served", "is served there", func(tag *audit.Tag) bool { tag.State.Served = bad; return true }},
		{"another head", "upstream's digest is", func(tag *audit.Tag) bool { tag.State.Head = bad; return true }},
		{"deleted", "deleted there: true", func(tag *audit.Tag) bool { tag.State.Deleted = noon; return true }},
		{"another entry", "last entry is 6 there", func(tag *audit.Tag) bool { tag.State.Index = 6; return true }},
		{"a tag too few", "has 1, the log 2", func(*audit.Tag) bool { return false }},
		{"a tag that never was", "upstream's digest is", func(tag *audit.Tag) bool { tag.Ref.Tag = "never"; return true }},
	} {
		if got := verify(tt.change); len(got) != 1 || !strings.Contains(got[0].What, tt.want) {
			t.Errorf("%s: want one problem that says %q, got %v", tt.name, tt.want, got)
		}
	}
	for i := range 3 { // what is newer than the checkpoint is not known to it
		if _, err := audittest.Move(t.Context(), store, audittest.Ref("a"), fmt.Sprint("newer", i), noon.Add(time.Hour+time.Duration(i)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	if got := verify(func(*audit.Tag) bool { return true }); len(got) > 0 {
		t.Errorf("a table that is ahead: %v", got)
	}
}

// Whatever is changed in a log is found, and the entry named if it is one.
func TestWhatIsWrongIsFound(t *testing.T) {
	dir := t.TempDir()
	store, key := openStore(t, dir), openKey(t, dir)
	for i := range 10 {
		move(t, store, i)
	}
	checkpoint := sign(t, store, key)
	other := openStore(t, t.TempDir())
	for i := range 12 {
		move(t, other, 100+i)
	}
	for _, tt := range []struct {
		name       string
		tiles      audit.Tiles
		checkpoint []byte
		since      []byte
		index      int64
		what       string
	}{
		{"an entry was changed", audit.Tiles{Hashes: store, Leaves: forger{store, 7, func(leaf []byte) []byte {
			return []byte(strings.Replace(string(leaf), "library/app", "library/bad", 1))
		}}}, checkpoint, nil, 7, "cannot be checked against its signed tree"},
		{"the checkpoint was changed", storeTiles(store), []byte(strings.Replace(string(checkpoint), "\n10\n", "\n11\n", 1)), nil, -1, "not signed"},
		{"the checkpoint is another log's", storeTiles(store), sign(t, other, openKey(t, t.TempDir())), nil, -1, "not signed"},
		{"the earlier checkpoint is longer", storeTiles(store), checkpoint, sign(t, other, key), -1, "fewer than the 12"},
		{"the earlier checkpoint has another history", storeTiles(other), sign(t, other, key), checkpoint, -1, "does not contain the 10"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := audit.Verify(t.Context(), tt.tiles, tt.checkpoint, tt.since, key.Verifier)
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Problems) != 1 || r.Problems[0].Index != tt.index || !strings.Contains(r.Problems[0].What, tt.what) {
				t.Errorf("problems are %+v, want one of entry %d: %q", r.Problems, tt.index, tt.what)
			}
		})
	}
}

// A log that is sealed well and says what cannot be is found out by its chains.
func TestBrokenChainsAreFound(t *testing.T) {
	good := func(i int) audit.Event {
		p := newStory(nil)
		for n := range i + 1 {
			p.see(fmt.Sprint(n), noon.Add(time.Duration(n)*time.Hour))
		}
		return p.events[i]
	}
	for _, tt := range []struct {
		name string
		make func(e *audit.Event)
		what string
	}{
		{"another old digest", func(e *audit.Event) { e.Old.Digest = audittest.Digest("x") }, "another digest"},
		{"no old digest", func(e *audit.Event) { e.Old = nil }, "another digest"},
		{"an interval before the last", func(e *audit.Event) { before := noon.Add(-time.Hour); e.Interval.NotBefore = &before }, "overlaps"},
		{"an interval turned round", func(e *audit.Event) { e.Interval.NotAfter = noon.Add(-time.Minute) }, "overlaps"},
		{"a second first sighting", func(e *audit.Event) { e.Type = audit.FirstSeen }, "known before"},
		{"no interval", func(e *audit.Event) { e.Interval = nil }, "without"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bad := good(2)
			tt.make(&bad)
			log := memoryLog{}
			for _, e := range []audit.Event{good(0), good(1), bad} {
				log.append(t, e)
			}
			key := openKey(t, t.TempDir())
			note, err := taglog.Sign(key.Origin(), log.tree, key.Signer)
			if err != nil {
				t.Fatal(err)
			}
			r, err := audit.Verify(t.Context(), &log, note, nil, key.Verifier)
			if err != nil || len(r.Problems) != 1 || r.Problems[0].Index != 2 || !strings.Contains(r.Problems[0].What, tt.what) {
				t.Errorf("report is %+v, %v; want one problem of entry 2: %q", r, err, tt.what)
			}
		})
	}
}

// A memoryLog is a log that anything can be written to.
type memoryLog struct {
	leaves [][]byte
	hashes []tlog.Hash
	tree   tlog.Tree
}

func (l *memoryLog) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = l.hashes[x]
	}
	return out, nil
}

func (l *memoryLog) append(t *testing.T, e audit.Event) {
	t.Helper()
	e.V = 1
	leaf, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	hashes, tree, err := taglog.Append(int64(len(l.leaves)), leaf, l)
	if err != nil {
		t.Fatal(err)
	}
	l.leaves, l.hashes, l.tree = append(l.leaves, leaf), append(l.hashes, hashes...), tree
}

func (l *memoryLog) ReadTiles(_ context.Context, tiles []tlog.Tile) ([][]byte, error) {
	var out [][]byte
	for _, t := range tiles {
		b, err := taglog.Entries(l.leaves[:min(t.W, len(l.leaves))])
		if t.L >= 0 {
			b, err = taglog.Tile(t, l)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

func (*memoryLog) SaveTiles([]tlog.Tile, [][]byte) {}

func (*memoryLog) ReadEndpoint(context.Context, string) ([]byte, error) {
	return nil, fmt.Errorf("not asked for")
}
