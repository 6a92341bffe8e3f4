package audit

import (
	"context"
	"fmt"
	"iter"
	"time"

	"filippo.io/torchwood"
	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit/taglog"
)

// A Report is the outcome of a verification. The log is good if there are no
// Problems.
type Report struct {
	Origin   string    `json:"origin"`
	Size     int64     `json:"size"`
	Root     tlog.Hash `json:"root"`
	Refs     int       `json:"refs"`
	Since    int64     `json:"since,omitempty"` // size of the earlier checkpoint that this log contains
	Problems []Problem `json:"problems"`

	chains Chains // what the entries say of every ref
}

// A Problem is something that a good log does not have. Index is -1 when it
// concerns no single entry.
type Problem struct {
	Index int64  `json:"index"`
	Ref   string `json:"ref,omitempty"`
	What  string `json:"what"`
}

// Verify re-checks a whole log from the outside: the signature of checkpoint,
// every entry against the signed tree, the chain of every ref, and, when since
// is given, that the log contains what that earlier checkpoint signed. It
// returns an error only when it could not read enough to tell.
func Verify(ctx context.Context, tiles torchwood.TileReader, checkpoint, since []byte, verifier note.Verifier) (Report, error) {
	r := Report{Problems: []Problem{}}
	c, err := taglog.Open(checkpoint, verifier)
	if err != nil {
		r.Problems = append(r.Problems, Problem{-1, "", err.Error()})
		return r, nil
	}
	r.Origin, r.Size, r.Root = c.Origin, c.N, c.Hash
	if since != nil {
		old, err := taglog.Open(since, verifier)
		if err != nil {
			what := "the earlier checkpoint: " + err.Error()
			if other, e := taglog.Parse(since); e == nil && other.Origin != c.Origin {
				what = fmt.Sprintf("the earlier checkpoint is of another log, %s: check it with that log's verifier; if this one was forked from it, its entry log.forked says so", other.Origin)
			}
			r.Problems = append(r.Problems, Problem{-1, "", what})
			return r, nil
		}
		r.Since = old.N
		if what := extends(ctx, tiles, old.Tree, c.Tree); what != "" {
			r.Problems = append(r.Problems, Problem{-1, "", what})
			return r, nil
		}
	}
	client, err := torchwood.NewClient(tiles)
	if err != nil {
		return r, err
	}
	next := int64(0)
	for index, leaf := range client.AllEntries(ctx, c.Tree, 0) {
		if index != next {
			r.Problems = append(r.Problems, Problem{next, "", fmt.Sprintf("entry %d follows %d", index, next-1)})
		}
		next = index + 1
		if p := r.chains.Add(index, leaf); p != nil {
			r.Problems = append(r.Problems, *p)
		}
	}
	if err := client.Err(); err != nil {
		if ctx.Err() != nil {
			return r, ctx.Err()
		}
		r.Problems = append(r.Problems, Problem{next, "", fmt.Sprintf("from entry %d on the log cannot be checked against its signed tree: %v", next, err)})
	} else if next != c.N {
		r.Problems = append(r.Problems, Problem{next, "", fmt.Sprintf("the log ends after %d of %d entries", next, c.N)})
	}
	for _, l := range r.chains.links {
		if l.head != "" {
			r.Refs++
		}
	}
	return r, nil
}

// CheckTags compares what a store serves with what the entries that were verified
// say: the tables are derived from the log, and answer the pulls. Tags that were
// written after the checkpoint are left out.
func (r *Report) CheckTags(tags iter.Seq2[Tag, error]) error {
	if len(r.Problems) > 0 {
		return nil // of a log that is not what it should be nothing is known
	}
	seen := 0
	for t, err := range tags {
		if err != nil {
			return err
		}
		seen++
		if t.State.Index >= r.Size {
			continue
		}
		l := r.chains.links[t.Ref]
		if what := l.contradicts(t.State); what != "" {
			r.Problems = append(r.Problems, Problem{l.index, t.Ref.String(), "the table of tags contradicts this entry: " + what})
		}
	}
	if seen < r.Refs {
		r.Problems = append(r.Problems, Problem{-1, "", fmt.Sprintf("the table of tags has %d, the log %d", seen, r.Refs)})
	}
	return nil
}

// extends proves that new contains old, or says why it does not.
func extends(ctx context.Context, tiles torchwood.TileReader, old, new tlog.Tree) string {
	if old.N > new.N {
		return fmt.Sprintf("the log has %d entries, fewer than the %d that were signed before", new.N, old.N)
	}
	if old.N == 0 {
		return ""
	}
	hashes := torchwood.TileHashReaderWithContext(ctx, new, tiles)
	proof, err := tlog.ProveTree(new.N, old.N, hashes)
	if err == nil {
		err = tlog.CheckTree(proof, new.N, new.Hash, old.N, old.Hash)
	}
	if err != nil {
		return fmt.Sprintf("the log does not contain the %d entries that were signed before: %v", old.N, err)
	}
	return ""
}

// Chains follow each ref from event to event: what one event moved to, the next
// one moves away from, and their intervals do not overlap. The zero Chains begin
// with the first entry of a log.
type Chains struct {
	// Midway believes the first event of each ref: what came before is not at hand.
	Midway bool

	links map[Ref]link
}

// Last is what the entries so far say of a ref: its head upstream and what is
// served, "" for what nothing was said of. What is deleted has the head it had.
func (c *Chains) Last(ref Ref) (head, served digest.Digest) {
	l := c.links[ref]
	return l.head, l.served
}

type link struct {
	head    digest.Digest
	after   time.Time // NotAfter of the last event
	deleted bool
	index   int64         // of the last event of any type
	served  digest.Digest // that it says is served
	denied  bool          // it says that nothing is, whatever is recorded
}

// contradicts returns how a state differs from what the log says of it, or "".
func (l link) contradicts(s State) string {
	switch {
	case s.Head != l.head:
		return fmt.Sprintf("upstream's digest is %s there, %s here", s.Head, l.head)
	case s.Served != l.served && !l.denied:
		return fmt.Sprintf("%s is served there, %s here", s.Served, l.served)
	case s.Deleted.IsZero() == l.deleted:
		return fmt.Sprintf("it is deleted there: %t", !s.Deleted.IsZero())
	case s.Index != l.index:
		return fmt.Sprintf("its last entry is %d there", s.Index)
	}
	return ""
}

// Add follows the next entry, and says what is wrong with it, or nil.
func (c *Chains) Add(index int64, leaf []byte) *Problem {
	e, err := ParseLeaf(leaf)
	if err != nil {
		return &Problem{index, "", err.Error()}
	}
	if e.Ref == (Ref{}) {
		return nil
	}
	last, known := c.links[e.Ref]
	next := last
	next.index, next.served, next.denied = index, e.Policy.Served, e.Policy.Mode == Deny
	if c.links == nil {
		c.links = make(map[Ref]link)
	}
	defer func() { c.links[e.Ref] = next }()
	if !e.Type.Moves() && e.Type != Deleted {
		return nil
	}
	problem := func(format string, args ...any) *Problem {
		return &Problem{index, e.Ref.String(), fmt.Sprintf(format, args...)}
	}
	switch {
	case e.Interval == nil || e.Type.Moves() && e.New == nil:
		return problem("%s without a new digest or an interval", e.Type)
	case last.head == "" && c.Midway && e.Type != FirstSeen:
		// It goes on from what was said elsewhere.
	case known != (e.Type != FirstSeen):
		return problem("%s, but the ref was known before: %t", e.Type, known)
	case known && (e.Old == nil || e.Old.Digest != last.head):
		return problem("moves away from another digest than %s, which the ref had", last.head)
	case known && last.deleted != (e.Type == Restored):
		return problem("%s, but the ref was deleted: %t", e.Type, last.deleted)
	case known && (e.Interval.NotBefore == nil || e.Interval.NotBefore.Before(last.after) || e.Interval.NotAfter.Before(*e.Interval.NotBefore)):
		return problem("its interval overlaps the one before")
	}
	next.after, next.deleted = e.Interval.NotAfter, e.Type == Deleted
	if e.Type.Moves() {
		next.head = e.New.Digest
	}
	return nil
}
