package sqlite

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"strings"

	"tidemark/audit"
)

// Tags returns the tags that q selects.
func (s *Store) Tags(ctx context.Context, q audit.TagQuery) ([]audit.Tag, error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT r.upstream, r.repository, r.tag, t.head_digest, t.head_media_type, t.head_size, t.head_since, t.last_confirmed, t.served_digest, t.leaf_idx
		FROM ref r JOIN tag_state t ON t.ref_id = r.id
		WHERE (r.upstream, r.repository, r.tag) > (?, ?, ?) AND t.head_since >= ?
		ORDER BY r.upstream, r.repository, r.tag`,
		q.After.Upstream, q.After.Repository, q.After.Tag, max(0, millis(q.MovedSince)))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []audit.Tag
	for rows.Next() && (q.Limit == 0 || len(out) < q.Limit) {
		var t audit.Tag
		var since, confirmed int64
		if err := rows.Scan(&t.Ref.Upstream, &t.Ref.Repository, &t.Ref.Tag, &t.State.Head, &t.State.HeadMediaType, &t.State.HeadSize,
			&since, &confirmed, &t.State.Served, &t.State.Index); err != nil {
			return nil, err
		}
		if t.State.HeadSince, t.State.LastConfirmed = fromMillis(since), fromMillis(confirmed); q.Match.Matches(t.Ref) {
			out = append(out, t)
		}
	}
	return out, rows.Err()
}

// TagNames returns the tags known of one repository, sorted.
func (s *Store) TagNames(ctx context.Context, upstream, repository string) ([]string, error) {
	rows, err := s.read.QueryContext(ctx, "SELECT tag FROM ref WHERE upstream = ? AND repository = ? ORDER BY tag", upstream, repository)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var tag string
		if err := rows.Scan(&tag); err != nil {
			return nil, err
		}
		out = append(out, tag)
	}
	return out, rows.Err()
}

// Events returns the entries that q selects.
func (s *Store) Events(ctx context.Context, q audit.EventQuery) ([]audit.Entry, error) {
	where, args := []string{"1"}, []any(nil)
	add := func(cond string, arg ...any) {
		where, args = append(where, cond), append(args, arg...)
	}
	if q.Ref != nil {
		add("ref_id = (SELECT id FROM ref WHERE upstream = ? AND repository = ? AND tag = ?)", q.Ref.Upstream, q.Ref.Repository, q.Ref.Tag)
	}
	if q.Type != "" {
		add("type = ?", string(q.Type))
	}
	if !q.Since.IsZero() {
		add("at >= ?", millis(q.Since))
	}
	if !q.Until.IsZero() {
		add("at < ?", millis(q.Until))
	}
	order, beyond := "ASC", "idx > ?"
	if q.Descending {
		order, beyond = "DESC", "idx < ?"
	}
	if q.After != nil {
		add(beyond, *q.After)
	}
	limit := q.Limit
	if limit == 0 {
		limit = math.MaxInt32
	}
	return s.entries(ctx, "WHERE "+strings.Join(where, " AND ")+" ORDER BY idx "+order+" LIMIT ?", append(args, limit)...)
}

// Leaves returns the leaves of the n entries from start on, all of them or an
// error.
func (s *Store) Leaves(ctx context.Context, start, n int64) ([][]byte, error) {
	es, err := s.entries(ctx, "WHERE idx >= ? AND idx < ? ORDER BY idx", start, start+n)
	if err != nil {
		return nil, err
	}
	if int64(len(es)) != n {
		return nil, fmt.Errorf("entries %d to %d: %w", start, start+n-1, fs.ErrNotExist)
	}
	out := make([][]byte, n)
	for i, e := range es {
		out[i] = e.Leaf
	}
	return out, nil
}

func (s *Store) entries(ctx context.Context, tail string, args ...any) (_ []audit.Entry, err error) {
	rows, err := s.read.QueryContext(ctx, "SELECT idx, body FROM log_leaf "+tail, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	var out []audit.Entry
	for rows.Next() {
		var e audit.Entry
		if err := rows.Scan(&e.Index, &e.Leaf); err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, rows.Err()
}

var _ interface {
	audit.Store
	audit.Log
} = (*Store)(nil)
