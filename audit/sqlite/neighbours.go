package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// neighbours tells what is known of the repository of a ref that moves from a digest to
// another.
func neighbours(ctx context.Context, q querier, id int64, ref audit.Ref, old, new digest.Digest, now time.Time) (n audit.Neighbourhood, err error) {
	err = errors.Join(sameHead(ctx, q, id, ref, new, &n), recentMoves(ctx, q, id, ref, now, &n))
	if id != 0 && err == nil { // a tag that is seen first did not move
		err = errors.Join(own(ctx, q, id, &n), sameBefore(ctx, q, id, ref, old, &n), customs(ctx, q, ref, now, &n))
	}
	return n, err
}

// stoodMost bounds the times that a ref's cadence is taken from.
const stoodMost = 50

func own(ctx context.Context, q querier, id int64, n *audit.Neighbourhood) error {
	var stints, first int64
	err := q.QueryRowContext(ctx, "SELECT count(*), coalesce(min(first_seen), 0) FROM tag_interval WHERE ref_id = ?", id).Scan(&stints, &first)
	if err != nil || stints == 0 {
		return err
	}
	n.Moves, n.Since = int(stints-1), fromMillis(first)
	rows, err := q.QueryContext(ctx, "SELECT first_seen FROM tag_interval WHERE ref_id = ? ORDER BY leaf_idx DESC LIMIT ?", id, stoodMost)
	if err != nil {
		return err
	}
	defer rows.Close()
	for later := int64(0); rows.Next(); {
		var at int64
		if err := rows.Scan(&at); err != nil {
			return err
		}
		if later != 0 {
			n.Stood = append(n.Stood, time.Duration(later-at)*time.Millisecond)
		}
		later = at
	}
	return rows.Err()
}

// sameBefore finds the other tags that meant the old digest, too.
func sameBefore(ctx context.Context, q querier, id int64, ref audit.Ref, d digest.Digest, n *audit.Neighbourhood) error {
	rows, err := q.QueryContext(ctx, `SELECT DISTINCT r.tag FROM ref r JOIN tag_interval i ON i.ref_id = r.id
		WHERE r.upstream = ? AND r.repository = ? AND i.digest = ? AND r.id <> ? ORDER BY r.tag`, ref.Upstream, ref.Repository, d, id)
	if err != nil {
		return err
	}
	n.Before, err = texts(rows)
	return err
}

func sameHead(ctx context.Context, q querier, id int64, ref audit.Ref, d digest.Digest, n *audit.Neighbourhood) error {
	rows, err := q.QueryContext(ctx, `SELECT r.tag FROM ref r JOIN tag_state t ON t.ref_id = r.id
		WHERE r.upstream = ? AND r.repository = ? AND t.head_digest = ? AND t.deleted_at IS NULL AND r.id <> ? ORDER BY r.tag`, ref.Upstream, ref.Repository, d, id)
	if err != nil {
		return err
	}
	n.Same, err = texts(rows)
	return err
}

func recentMoves(ctx context.Context, q querier, id int64, ref audit.Ref, now time.Time, n *audit.Neighbourhood) error {
	rows, err := q.QueryContext(ctx, `SELECT r.tag, i.first_seen, (SELECT max(p.first_seen) FROM tag_interval p WHERE p.ref_id = i.ref_id AND p.leaf_idx < i.leaf_idx) AS before, l.body
		FROM ref r JOIN tag_interval i ON i.ref_id = r.id JOIN log_leaf l ON l.idx = i.leaf_idx
		WHERE r.upstream = ? AND r.repository = ? AND r.id <> ? AND i.first_seen >= ? AND before IS NOT NULL
			AND i.leaf_idx = (SELECT max(leaf_idx) FROM tag_interval WHERE ref_id = r.id)`, ref.Upstream, ref.Repository, id, millis(now.Add(-audit.AliasWindow)))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var m audit.SiblingMove
		var at, before int64
		var leaf []byte
		if err := rows.Scan(&m.Tag, &at, &before, &leaf); err != nil {
			return err
		}
		var e struct {
			Class audit.Class `json:"class"`
		}
		if err := json.Unmarshal(leaf, &e); err != nil {
			return err
		}
		m.At, m.Stood, m.Class = fromMillis(at), time.Duration(at-before)*time.Millisecond, e.Class
		n.Recent = append(n.Recent, m)
	}
	return rows.Err()
}

// customs tells what is usual in a repository, from what happened there more than an
// hour ago.
func customs(ctx context.Context, q querier, ref audit.Ref, now time.Time, n *audit.Neighbourhood) error {
	rows, err := q.QueryContext(ctx, `SELECT r.tag, i.first_seen FROM ref r JOIN tag_interval i ON i.ref_id = r.id
		WHERE r.upstream = ? AND r.repository = ? AND i.first_seen < ?
			AND EXISTS (SELECT 1 FROM tag_interval p WHERE p.ref_id = i.ref_id AND p.leaf_idx < i.leaf_idx)`, ref.Upstream, ref.Repository, millis(now.Add(-audit.BurstWindow)))
	if err != nil {
		return err
	}
	defer rows.Close()
	hours := make(map[int64]int)
	for rows.Next() {
		var tag string
		var at int64
		if err := rows.Scan(&tag, &at); err != nil {
			return err
		}
		if audit.FullVersion(tag) {
			n.MovedVersions++
		}
		hours[at/audit.BurstWindow.Milliseconds()]++
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for _, moves := range hours {
		if moves >= audit.BurstRefs {
			n.Bursts++
		}
	}
	var last int64
	err = q.QueryRowContext(ctx, `SELECT coalesce(max(l.at), 0) FROM log_leaf l JOIN ref r ON r.id = l.ref_id
		WHERE l.type = ? AND r.upstream = ? AND r.repository = ?`, string(audit.Burst), ref.Upstream, ref.Repository).Scan(&last)
	if last > 0 {
		n.LastBurst = fromMillis(last)
	}
	return err
}

// former returns the newest digest that was served for a ref, that is not to be skipped,
// and that nothing speaks against. That it was served is what the entries say.
func former(ctx context.Context, q querier, id int64, skip func(digest.Digest) bool) (c audit.Content, ok bool, err error) {
	entries, err := leaves(ctx, q, "SELECT body FROM log_leaf WHERE ref_id = ? ORDER BY idx DESC", id)
	if err != nil {
		return c, false, err
	}
	tried := make(map[digest.Digest]bool)
	for _, e := range entries {
		d := e.Policy.Served
		if d == "" || tried[d] || skip(d) {
			continue
		}
		tried[d] = true
		err := q.QueryRowContext(ctx, `SELECT i.digest, i.media_type, i.size FROM tag_interval i LEFT JOIN tag_verdict v ON v.ref_id = i.ref_id AND v.digest = i.digest
			WHERE i.ref_id = ? AND i.digest = ? AND coalesce(v.rejected, 0) = 0 AND coalesce(v.withdrawn, '') = '' AND coalesce(v.escalated, '') = ''
			ORDER BY i.leaf_idx DESC LIMIT 1`, id, d).Scan(&c.Digest, &c.MediaType, &c.Size)
		if !errors.Is(err, sql.ErrNoRows) {
			return c, err == nil, err
		}
	}
	return audit.Content{}, false, nil
}

// burstOf tells whether a burst that a ref was part of was told within a time.
func burstOf(ctx context.Context, q querier, ref audit.Ref, from, to time.Time) (bool, error) {
	bursts, err := leaves(ctx, q, `SELECT l.body FROM log_leaf l JOIN ref r ON r.id = l.ref_id
		WHERE l.type = ? AND r.upstream = ? AND r.repository = ? AND l.at BETWEEN ? AND ?`, string(audit.Burst), ref.Upstream, ref.Repository, millis(from), millis(to))
	return slices.ContainsFunc(bursts, func(e audit.Event) bool { return slices.Contains(e.Tags, ref.Tag) }), err
}

// leaves are the events that a query selects the leaves of.
func leaves(ctx context.Context, q querier, query string, args ...any) ([]audit.Event, error) {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	return collect(rows, func(scan scanner) (e audit.Event, err error) {
		var leaf []byte
		if err := scan(&leaf); err != nil {
			return e, err
		}
		return audit.ParseLeaf(leaf)
	})
}
