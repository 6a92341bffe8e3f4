package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// Recall implements audit.Memory.
func (s *Store) Recall(ctx context.Context, key string) (value string, err error) {
	err = s.read.QueryRowContext(ctx, "SELECT value FROM memory WHERE key = ?", key).Scan(&value)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return value, err
}

// Remember implements audit.Memory.
func (s *Store) Remember(ctx context.Context, key, value string) error {
	return s.tx(ctx, func(tx *sql.Tx) error { return remember(ctx, tx, key, value) })
}

func remember(ctx context.Context, tx *sql.Tx, key, value string) error {
	_, err := tx.ExecContext(ctx, "INSERT INTO memory (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", key, value)
	return err
}

// AddExposures implements audit.ExposureStore.
func (s *Store) AddExposures(ctx context.Context, batch []audit.Exposure) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		stmt, err := tx.PrepareContext(ctx, `INSERT INTO exposure (digest, client, user, ref, first, last, resolves, fetches) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (digest, client, user, ref) DO UPDATE SET first = min(first, excluded.first), last = max(last, excluded.last),
				resolves = resolves + excluded.resolves, fetches = fetches + excluded.fetches`)
		if err != nil {
			return err
		}
		defer stmt.Close()
		for _, e := range batch {
			if _, err := stmt.ExecContext(ctx, e.Digest, e.Client, e.User, e.Ref, millis(e.First), millis(e.Last), e.Resolves, e.Fetches); err != nil {
				return err
			}
		}
		return nil
	})
}

// ForgetExposures implements audit.ExposureStore.
func (s *Store) ForgetExposures(ctx context.Context, before time.Time) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM exposure WHERE last < ?", millis(before))
		return err
	})
}

// Exposures returns who resolved and fetched a digest, by client.
func (s *Store) Exposures(ctx context.Context, d digest.Digest) ([]audit.Exposure, error) {
	var out []audit.Exposure
	for e, err := range s.exposures(ctx, "WHERE digest = ?", d) {
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, nil
}

// EachExposure yields all of them, in order.
func (s *Store) EachExposure(ctx context.Context) iter.Seq2[audit.Exposure, error] {
	return s.exposures(ctx, "")
}

func (s *Store) exposures(ctx context.Context, where string, args ...any) iter.Seq2[audit.Exposure, error] {
	return func(yield func(audit.Exposure, error) bool) {
		rows, err := s.read.QueryContext(ctx, "SELECT digest, client, user, ref, first, last, resolves, fetches FROM exposure "+where+" ORDER BY digest, client, user, ref", args...)
		if err != nil {
			yield(audit.Exposure{}, err)
			return
		}
		defer rows.Close()
		for rows.Next() {
			var e audit.Exposure
			var first, last int64
			if err := rows.Scan(&e.Digest, &e.Client, &e.User, &e.Ref, &first, &last, &e.Resolves, &e.Fetches); err != nil {
				yield(audit.Exposure{}, err)
				return
			}
			if e.First, e.Last = fromMillis(first), fromMillis(last); !yield(e, nil) {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(audit.Exposure{}, err)
		}
	}
}

// PutCondition implements audit.ConditionStore. One that a process before left
// open ends when the next one of its upstream begins. The same one again, because
// the first time was not known to have succeeded, changes nothing.
func (s *Store) PutCondition(ctx context.Context, c audit.Condition, told audit.Event) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		since := millis(c.Since)
		if c.Until != nil {
			_, err := tx.ExecContext(ctx, "UPDATE upstream_condition SET until = ? WHERE upstream = ? AND until IS NULL", millis(*c.Until), c.Upstream)
			if err != nil {
				return err
			}
			return putNotice(ctx, tx, told)
		}
		var known bool
		err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM upstream_condition WHERE upstream = ? AND type = ? AND since = ?)", c.Upstream, c.Type, since).Scan(&known)
		if err != nil || known {
			return err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE upstream_condition SET until = ? WHERE upstream = ? AND until IS NULL", since, c.Upstream); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "INSERT INTO upstream_condition (upstream, type, since, cause) VALUES (?, ?, ?, ?)", c.Upstream, c.Type, since, c.Cause)
		if err != nil {
			return err
		}
		return putNotice(ctx, tx, told)
	})
}

// Conditions returns the latest conditions of upstreams, newest first.
func (s *Store) Conditions(ctx context.Context, limit int) ([]audit.Condition, error) {
	rows, err := s.read.QueryContext(ctx, "SELECT upstream, type, since, until, cause FROM upstream_condition ORDER BY id DESC LIMIT ?", limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []audit.Condition
	for rows.Next() {
		var c audit.Condition
		var since int64
		var until sql.NullInt64
		if err := rows.Scan(&c.Upstream, &c.Type, &since, &until, &c.Cause); err != nil {
			return nil, err
		}
		c.Since, c.Until = fromMillis(since), timeOf(until)
		out = append(out, c)
	}
	return out, rows.Err()
}

// Fork has the log go on under a new origin, with e as the next entry: the one
// that says so. What was signed under the old one is kept.
func (s *Store) Fork(ctx context.Context, origin string, e audit.Event) (index int64, err error) {
	err = s.tx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "UPDATE log_state SET origin = ? WHERE id = 1", origin); err != nil {
			return err
		}
		index, err = appendLeaf(ctx, tx, 0, e)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("fork the log: %w", err)
	}
	return index, nil
}
