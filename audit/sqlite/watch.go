package sqlite

import (
	"context"
	"time"

	"tidemark/audit"
)

// Pulled returns the refs that clients resolved since a time.
func (s *Store) Pulled(ctx context.Context, since time.Time) ([]audit.Pulled, error) {
	rows, err := s.read.QueryContext(ctx, `SELECT ref, count(DISTINCT client) FROM exposure
		WHERE last >= ? AND resolves > 0 GROUP BY ref ORDER BY ref`, millis(since))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []audit.Pulled
	for rows.Next() {
		var name string
		var p audit.Pulled
		if err := rows.Scan(&name, &p.Clients); err != nil {
			return nil, err
		}
		if p.Ref, err = audit.ParseRef(name); err != nil {
			continue // a repository, of which something was fetched by digest
		}
		out = append(out, p)
	}
	return out, rows.Err()
}

// Known returns the repositories of which a tag is known, as refs without tags.
func (s *Store) Known(ctx context.Context) ([]audit.Ref, error) {
	rows, err := s.read.QueryContext(ctx, "SELECT DISTINCT upstream, repository FROM ref ORDER BY upstream, repository")
	if err != nil {
		return nil, err
	}
	return collect(rows, func(scan scanner) (r audit.Ref, err error) {
		err = scan(&r.Upstream, &r.Repository)
		return r, err
	})
}

// Moves tells how often a ref moved that we saw, and since when it is known; 0 and
// the zero time when it is not.
func (s *Store) Moves(ctx context.Context, ref audit.Ref) (moves int, since time.Time, err error) {
	var n, first int64
	err = s.read.QueryRowContext(ctx, `SELECT count(*), coalesce(min(first_seen), 0) FROM tag_interval
		WHERE ref_id = (SELECT id FROM ref WHERE upstream = ? AND repository = ? AND tag = ?)`, ref.Upstream, ref.Repository, ref.Tag).Scan(&n, &first)
	if err != nil || n == 0 {
		return 0, time.Time{}, err
	}
	return int(n - 1), fromMillis(first), nil
}
