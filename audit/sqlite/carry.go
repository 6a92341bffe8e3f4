package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// Import implements audit.Importer.
func (s *Store) Import(ctx context.Context, cargo audit.Cargo, e audit.Event, next func(audit.Carried, audit.Record, time.Time) (audit.State, []audit.Event)) (index int64, err error) {
	err = s.tx(ctx, func(tx *sql.Tx) error {
		var known bool
		err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM bundle WHERE id = ?)", cargo.Bundle).Scan(&known)
		if err == nil && known {
			err = audit.ErrImportedAlready
		}
		if err != nil {
			return err
		}
		if index, err = appendLeaf(ctx, tx, 0, e); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO bundle (id, origin, log_size, leaf_idx) VALUES (?, ?, ?, ?)", cargo.Bundle, cargo.Origin, cargo.LogSize, index); err != nil {
			return err
		}
		if err := remember(ctx, tx, trusted(cargo.Origin), cargo.VKey); err != nil {
			return err
		}
		for _, c := range cargo.Refs {
			if err := importRef(ctx, tx, cargo, c, index, next); err != nil {
				return fmt.Errorf("%s: %w", c.Ref, err)
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("record the import: %w", err)
	}
	return index, nil
}

func importRef(ctx context.Context, tx *sql.Tx, cargo audit.Cargo, c audit.Carried, index int64, next func(audit.Carried, audit.Record, time.Time) (audit.State, []audit.Event)) error {
	confirmed, err := claimConfirmed(ctx, tx, c.Ref)
	if err != nil {
		return err
	}
	id, _, err := advance(ctx, tx, c.Ref, func(r audit.Record) (audit.State, []audit.Event, error) {
		st, events := next(c, r, confirmed)
		return st, events, nil
	})
	if err != nil {
		return err
	}
	if c.Closed != nil {
		_, err := tx.ExecContext(ctx, "UPDATE tag_claim SET until = ?, end_reason = ?, last_confirmed = max(last_confirmed, ?) WHERE ref_id = ? AND basis = ? AND served = 0 AND source = ? AND until IS NULL",
			millis(*c.Closed.Until), c.Closed.EndReason, millis(c.Closed.LastConfirmed), id, audit.Imported, c.Closed.Source)
		if err != nil {
			return err
		}
	}
	claims, err := continueServed(ctx, tx, id, cargo.Origin, c.Claims)
	if err != nil {
		return err
	}
	if err := putClaims(ctx, tx, id, index, claims); err != nil {
		return err
	}
	// The newest claim is confirmed again by a bundle in which nothing moved.
	_, err = tx.ExecContext(ctx, "UPDATE tag_claim SET last_confirmed = max(last_confirmed, ?) WHERE ref_id = ? AND basis = ? AND source = ? AND until IS NULL",
		millis(c.Confirmed), id, audit.Imported, cargo.Origin)
	if err != nil || c.Confirmed.Before(confirmed) {
		return err // a later bundle has said already what is to be kept
	}
	return putCarried(ctx, tx, id, cargo, c)
}

// continueServed goes on with what was served at the end of an earlier bundle: the first
// claim of a later one continues it, or ends it.
func continueServed(ctx context.Context, tx *sql.Tx, id int64, origin string, claims []audit.Claim) ([]audit.Claim, error) {
	first := slices.IndexFunc(claims, func(c audit.Claim) bool { return c.Served })
	if first < 0 {
		return claims, nil
	}
	next := claims[first]
	var since int64
	var open digest.Digest
	err := tx.QueryRowContext(ctx, "SELECT since, digest FROM tag_claim WHERE ref_id = ? AND basis = ? AND served = 1 AND source = ? AND until IS NULL AND since < ?",
		id, audit.Imported, origin, millis(next.Since)).Scan(&since, &open)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return claims, nil
	case err != nil:
		return nil, err
	case open != next.Digest:
		_, err := tx.ExecContext(ctx, "UPDATE tag_claim SET until = ?2 WHERE ref_id = ?1 AND basis = ?3 AND served = 1 AND source = ?4 AND until IS NULL AND since < ?2",
			id, millis(next.Since), audit.Imported, origin)
		return claims, err
	}
	claims = slices.Clone(claims)
	claims[first].Since = fromMillis(since)
	return claims, nil
}

// claimConfirmed is the latest time that an import has ref confirmed at, or zero.
func claimConfirmed(ctx context.Context, tx *sql.Tx, ref audit.Ref) (time.Time, error) {
	var at sql.NullInt64
	err := tx.QueryRowContext(ctx, `SELECT max(c.last_confirmed) FROM tag_claim c JOIN ref r ON r.id = c.ref_id
		WHERE r.upstream = ? AND r.repository = ? AND r.tag = ? AND c.basis = ?`, ref.Upstream, ref.Repository, ref.Tag, audit.Imported).Scan(&at)
	if err != nil || !at.Valid {
		return time.Time{}, err
	}
	return fromMillis(at.Int64), nil
}

// putCarried notes what of a ref is kept from here on, and what refers to it.
func putCarried(ctx context.Context, tx *sql.Tx, id int64, cargo audit.Cargo, c audit.Carried) error {
	platforms, err := json.Marshal(c.Platforms)
	if err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "DELETE FROM bundle_pin WHERE ref_id = ?", id); err != nil {
		return err
	}
	keep := func(d digest.Digest, platforms string) error {
		_, err := tx.ExecContext(ctx, "INSERT INTO bundle_pin (ref_id, digest, platforms, bundle) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", id, d, platforms, cargo.Bundle)
		return err
	}
	if err := keep(c.Digest, string(platforms)); err != nil {
		return err
	}
	for _, r := range c.Referrers {
		if err := keep(r.Digest, "null"); err != nil {
			return err
		}
		if err := putReferrer(ctx, tx, c.Ref.Upstream, c.Ref.Repository, r); err != nil {
			return err
		}
	}
	return nil
}

// trusted is where the key of a log is remembered.
func trusted(origin string) string { return "trusted " + origin }

// TrustedKey returns the key by which a bundle of a log was imported before, or "".
func (s *Store) TrustedKey(ctx context.Context, origin string) (string, error) {
	return s.Recall(ctx, trusted(origin))
}

func putClaims(ctx context.Context, tx *sql.Tx, id, index int64, claims []audit.Claim) error {
	for _, c := range claims {
		_, err := tx.ExecContext(ctx, `INSERT INTO tag_claim (ref_id, basis, served, source, since, digest, media_type, size, not_before, last_confirmed, until, end_reason, source_idx, leaf_idx)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (ref_id, basis, served, source, since, digest) DO UPDATE SET last_confirmed = max(last_confirmed, excluded.last_confirmed),
				until = coalesce(excluded.until, until), end_reason = CASE WHEN excluded.until IS NULL THEN end_reason ELSE excluded.end_reason END`,
			id, c.Basis, c.Served, c.Source, millis(c.Since), c.Digest, c.MediaType, c.Size, nullMillis(c.NotBefore), millis(c.LastConfirmed), nullMillis(c.Until), c.EndReason, c.SourceIndex, index)
		if err != nil {
			return err
		}
	}
	return nil
}

// AddClaims commits e and what it says that a ref meant by the word of others.
func (s *Store) AddClaims(ctx context.Context, e audit.Event, ref audit.Ref, claims []audit.Claim) (index int64, err error) {
	err = s.tx(ctx, func(tx *sql.Tx) error {
		id, err := insertRef(ctx, tx, ref)
		if err != nil {
			return err
		}
		if index, err = appendLeaf(ctx, tx, 0, e); err != nil {
			return err
		}
		return putClaims(ctx, tx, id, index, claims)
	})
	if err != nil {
		return 0, fmt.Errorf("record what is said of %s: %w", ref, err)
	}
	return index, nil
}

// Claims returns what others say that a ref meant, newest first.
func (s *Store) Claims(ctx context.Context, ref audit.Ref) ([]audit.Claim, error) {
	rows, err := s.read.QueryContext(ctx, `SELECT c.basis, c.served, c.source, c.digest, c.media_type, c.size, c.not_before, c.since, c.last_confirmed, c.until, c.end_reason, c.source_idx, c.leaf_idx
		FROM tag_claim c JOIN ref r ON r.id = c.ref_id WHERE r.upstream = ? AND r.repository = ? AND r.tag = ? ORDER BY c.since DESC, c.basis, c.served, c.source`,
		ref.Upstream, ref.Repository, ref.Tag)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []audit.Claim
	for rows.Next() {
		var c audit.Claim
		var notBefore, until, index sql.NullInt64
		var since, confirmed int64
		if err := rows.Scan(&c.Basis, &c.Served, &c.Source, &c.Digest, &c.MediaType, &c.Size, &notBefore, &since, &confirmed, &until, &c.EndReason, &index, &c.Index); err != nil {
			return nil, err
		}
		c.Since, c.LastConfirmed, c.NotBefore, c.Until = fromMillis(since), fromMillis(confirmed), timeOf(notBefore), timeOf(until)
		if index.Valid {
			c.SourceIndex = &index.Int64
		}
		out = append(out, c)
	}
	return out, rows.Err()
}

// PutPin implements audit.PinStore.
func (s *Store) PutPin(ctx context.Context, e audit.Event, p audit.Pin) (index int64, err error) {
	platforms, err := json.Marshal(p.Platforms)
	if err != nil {
		return 0, err
	}
	err = s.tx(ctx, func(tx *sql.Tx) error {
		if index, err = appendLeaf(ctx, tx, 0, e); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO pin (target, upstream, repository, tag, digest, platforms, reason, leaf_idx) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (target) DO UPDATE SET platforms = excluded.platforms, reason = excluded.reason, leaf_idx = excluded.leaf_idx`,
			p.Target, p.Ref.Upstream, p.Ref.Repository, p.Ref.Tag, p.Digest, string(platforms), p.Reason, index)
		return err
	})
	return index, err
}

// DropPin implements audit.PinStore.
func (s *Store) DropPin(ctx context.Context, e audit.Event, target string) (index int64, err error) {
	err = s.tx(ctx, func(tx *sql.Tx) error {
		pins, err := tx.ExecContext(ctx, "DELETE FROM pin WHERE target = ?", target)
		if err != nil {
			return err
		}
		carried, err := tx.ExecContext(ctx, "DELETE FROM bundle_pin WHERE digest = ?1 OR ref_id IN (SELECT id FROM ref WHERE upstream || '/' || repository || ':' || tag = ?1)", target)
		if err != nil {
			return err
		}
		n, err := pins.RowsAffected()
		m, err2 := carried.RowsAffected()
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		if n+m == 0 {
			return fmt.Errorf("%s is not pinned: %w", target, fs.ErrNotExist)
		}
		index, err = appendLeaf(ctx, tx, 0, e)
		return err
	})
	return index, err
}

// Chronicle returns all that is known of ref.
func (s *Store) Chronicle(ctx context.Context, ref audit.Ref) (c audit.Chronicle, err error) {
	c = audit.Chronicle{Ref: ref, Rejected: make(map[digest.Digest]bool), Withheld: make(map[digest.Digest]bool)}
	tree, err := s.Tree(ctx)
	if err != nil {
		return c, err
	}
	c.Size = tree.N
	if c.Entries, err = s.Events(ctx, audit.EventQuery{Ref: &ref}); err != nil {
		return c, err
	}
	if c.Stints, err = s.History(ctx, ref, audit.HistoryQuery{}); err != nil {
		return c, err
	}
	if c.Claims, err = s.Claims(ctx, ref); err != nil {
		return c, err
	}
	st, err := s.State(ctx, ref)
	if err != nil {
		return c, err
	}
	for _, candidate := range st.Candidates {
		if !candidate.Served {
			c.Withheld[candidate.Digest] = true
		}
	}
	if err := s.verdicts(ctx, &c); err != nil {
		return c, err
	}
	gaps, err := s.entries(ctx, "WHERE type = ? AND ref_id IS NULL ORDER BY idx", string(audit.Gap))
	if err != nil {
		return c, err
	}
	for _, g := range gaps {
		e, err := audit.ParseLeaf(g.Leaf)
		if err != nil {
			return c, fmt.Errorf("entry %d: %w", g.Index, err)
		}
		if e.Gap != nil {
			c.Gaps = append(c.Gaps, *e.Gap)
		}
	}
	return c, nil
}

// verdicts are the digests that an operator rejected, or upstream took back.
func (s *Store) verdicts(ctx context.Context, c *audit.Chronicle) error {
	rows, err := s.read.QueryContext(ctx, `SELECT v.digest, v.rejected, v.withdrawn <> '' FROM tag_verdict v JOIN ref r ON r.id = v.ref_id
		WHERE r.upstream = ? AND r.repository = ? AND r.tag = ?`, c.Ref.Upstream, c.Ref.Repository, c.Ref.Tag)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var d digest.Digest
		var rejected, withdrawn bool
		if err := rows.Scan(&d, &rejected, &withdrawn); err != nil {
			return err
		}
		c.Rejected[d] = c.Rejected[d] || rejected
		c.Withheld[d] = c.Withheld[d] || withdrawn
	}
	return rows.Err()
}

// eventPage is how many events are read at a time: nobody is kept from the database
// by a reader that is slow.
const eventPage = 256

// EachEvent yields the events about refs, each from an index of its own on, up to
// but without entry end, in order of their indexes.
func (s *Store) EachEvent(ctx context.Context, from map[audit.Ref]int64, end int64) iter.Seq2[audit.Entry, error] {
	return func(yield func(audit.Entry, error) bool) {
		wanted, err := s.wantedRefs(ctx, from)
		if err != nil {
			yield(audit.Entry{}, err)
			return
		}
		for next := int64(0); ; {
			page, err := s.entries(ctx, `WHERE idx IN (SELECT l.idx FROM json_each(?) w CROSS JOIN log_leaf l
					ON l.ref_id = w.value ->> 0 AND l.idx >= max(w.value ->> 1, ?) AND l.idx < ?)
				ORDER BY idx LIMIT ?`, wanted, next, end, eventPage)
			if err != nil {
				yield(audit.Entry{}, err)
				return
			}
			for _, e := range page {
				if !yield(e, nil) {
					return
				}
				next = e.Index + 1
			}
			if len(page) < eventPage {
				return
			}
		}
	}
}

// wantedRefs is JSON of the refs' ids and from where on their events are wanted.
func (s *Store) wantedRefs(ctx context.Context, from map[audit.Ref]int64) (string, error) {
	wanted := [][2]int64{}
	for ref, index := range from {
		var id int64
		err := s.read.QueryRowContext(ctx, "SELECT id FROM ref WHERE upstream = ? AND repository = ? AND tag = ?", ref.Upstream, ref.Repository, ref.Tag).Scan(&id)
		if errors.Is(err, sql.ErrNoRows) {
			continue
		}
		if err != nil {
			return "", err
		}
		wanted = append(wanted, [2]int64{id, index})
	}
	b, err := json.Marshal(wanted)
	return string(b), err
}

// TagNamesAt returns the tags of one repository that had been seen at a moment and
// were not deleted then, sorted; at a time with those that others say there were before
// they were seen here.
func (s *Store) TagNamesAt(ctx context.Context, upstream, repository string, m audit.Moment) ([]string, error) {
	began, lasts, claimed := "i.leaf_idx <= ?3", "(e.idx IS NULL OR e.idx > ?3)", ""
	point, ok := m.Index()
	if at, byTime := m.Time(); !ok && byTime {
		began, lasts, point = "i.first_seen <= ?3", "(i.ended IS NULL OR i.ended > ?3)", millis(at)
		claimed = `UNION SELECT r.tag FROM ref r JOIN tag_claim c ON c.ref_id = r.id WHERE r.upstream = ?1 AND r.repository = ?2
			AND (c.served = 1 OR c.basis = '` + audit.Asserted + `') AND c.since <= ?3 AND (c.until IS NULL OR c.until > ?3)
			AND NOT EXISTS (SELECT 1 FROM tag_interval i WHERE i.ref_id = r.id AND i.first_seen <= ?3)`
	}
	rows, err := s.read.QueryContext(ctx, `SELECT DISTINCT r.tag FROM ref r JOIN tag_interval i ON i.ref_id = r.id LEFT JOIN log_leaf e ON e.event_id = i.end_event
		WHERE r.upstream = ?1 AND r.repository = ?2 AND `+began+` AND `+lasts+" "+claimed+" ORDER BY 1", upstream, repository, point)
	if err != nil {
		return nil, err
	}
	return texts(rows)
}

// AddReferrers notes what refers to manifests of a repository.
func (s *Store) AddReferrers(ctx context.Context, upstream, repository string, list []audit.Referrer) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		for _, r := range list {
			if err := putReferrer(ctx, tx, upstream, repository, r); err != nil {
				return err
			}
		}
		return nil
	})
}

func putReferrer(ctx context.Context, tx *sql.Tx, upstream, repository string, r audit.Referrer) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO referrer (upstream, repository, subject, digest, descriptor) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (upstream, repository, subject, digest) DO UPDATE SET descriptor = excluded.descriptor`, upstream, repository, r.Subject, r.Digest, string(r.Descriptor))
	return err
}

// Referrers returns what is known to refer to a manifest of a repository, in order
// of digests.
func (s *Store) Referrers(ctx context.Context, upstream, repository string, subject digest.Digest) ([]audit.Referrer, error) {
	rows, err := s.read.QueryContext(ctx, "SELECT digest, descriptor FROM referrer WHERE upstream = ? AND repository = ? AND subject = ? ORDER BY digest", upstream, repository, subject)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []audit.Referrer
	for rows.Next() {
		r := audit.Referrer{Subject: subject}
		var descriptor []byte
		if err := rows.Scan(&r.Digest, &descriptor); err != nil {
			return nil, err
		}
		r.Descriptor = descriptor
		out = append(out, r)
	}
	return out, rows.Err()
}

var _ interface {
	audit.Importer
	audit.PinStore
} = (*Store)(nil)
