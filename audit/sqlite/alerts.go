package sqlite

import (
	"context"
	"database/sql"
	"time"

	"tidemark/audit"
)

// putAlert opens, acknowledges and ends alerts as an event says.
func putAlert(ctx context.Context, tx *sql.Tx, refID, index int64, e audit.Event) error {
	ends := e.Ends()
	if e.Opens() {
		ends = append(ends, e.Type)
	}
	for _, kind := range ends {
		if _, err := tx.ExecContext(ctx, "UPDATE alert SET resolved = ?, resolved_by = ? WHERE ref_id = ? AND type = ? AND resolved IS NULL",
			millis(e.Time), string(e.Type), refID, string(kind)); err != nil {
			return err
		}
	}
	if len(ends) > 0 {
		// Nobody need be reminded of what is over.
		if _, err := tx.ExecContext(ctx, `DELETE FROM outbox WHERE reminder > 0 AND batch IS NULL
			AND leaf_idx IN (SELECT leaf_idx FROM alert WHERE ref_id = ? AND resolved IS NOT NULL)`, refID); err != nil {
			return err
		}
	}
	if e.Opens() {
		about := ""
		if e.New != nil {
			about = e.New.Digest.String()
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO alert (leaf_idx, ref_id, type, digest, opened) VALUES (?, ?, ?, ?, ?)", index, refID, string(e.Type), about, millis(e.Time))
		return err
	}
	if e.Operator == nil {
		return nil
	}
	var err error
	switch e.Operator.Action {
	case audit.Acknowledge:
		_, err = tx.ExecContext(ctx, "UPDATE alert SET acknowledged = ? WHERE leaf_idx = ?", millis(e.Time), *e.Operator.Entry)
	case audit.MuteAction:
		_, err = tx.ExecContext(ctx, `INSERT INTO mute (pattern, until, reason) VALUES (?, ?, ?)
			ON CONFLICT (pattern) DO UPDATE SET until = excluded.until, reason = excluded.reason`, e.Operator.Target, millis(*e.Operator.Until), e.Operator.Reason)
	case audit.Unmute:
		_, err = tx.ExecContext(ctx, "DELETE FROM mute WHERE pattern = ?", e.Operator.Target)
	}
	return err
}

// Alerts implements audit.AlertStore.
func (s *Store) Alerts(ctx context.Context, all bool, limit int) ([]audit.StatefulAlert, error) {
	rows, err := s.read.QueryContext(ctx, `SELECT a.leaf_idx, r.upstream, r.repository, r.tag, a.type, a.digest, a.opened, a.acknowledged, a.resolved, a.resolved_by
		FROM alert a JOIN ref r ON r.id = a.ref_id WHERE ? OR a.resolved IS NULL ORDER BY a.leaf_idx DESC LIMIT ?`, all, limit)
	if err != nil {
		return nil, err
	}
	return collect(rows, func(scan scanner) (a audit.StatefulAlert, err error) {
		var opened int64
		var acknowledged, resolved sql.NullInt64
		err = scan(&a.Index, &a.Ref.Upstream, &a.Ref.Repository, &a.Ref.Tag, &a.Type, &a.Digest, &opened, &acknowledged, &resolved, &a.ResolvedBy)
		a.Opened, a.Acknowledged, a.Resolved = fromMillis(opened), timeOf(acknowledged), timeOf(resolved)
		return a, err
	})
}

// AlertCounts returns how many alerts are open, by type.
func (s *Store) AlertCounts(ctx context.Context) (map[audit.Type]int64, error) {
	rows, err := s.read.QueryContext(ctx, "SELECT type, count(*) FROM alert WHERE resolved IS NULL GROUP BY type")
	if err != nil {
		return nil, err
	}
	out := make(map[audit.Type]int64)
	_, err = collect(rows, func(scan scanner) (_ struct{}, err error) {
		var kind audit.Type
		var n int64
		err = scan(&kind, &n)
		out[kind] = n
		return struct{}{}, err
	})
	return out, err
}

// Mutes implements audit.AlertStore.
func (s *Store) Mutes(ctx context.Context, now time.Time) ([]audit.Mute, error) {
	rows, err := s.read.QueryContext(ctx, "SELECT pattern, until, reason FROM mute WHERE until > ? ORDER BY pattern", millis(now))
	if err != nil {
		return nil, err
	}
	return collect(rows, func(scan scanner) (m audit.Mute, err error) {
		var pattern string
		var until int64
		if err := scan(&pattern, &until, &m.Reason); err != nil {
			return m, err
		}
		m.Until = fromMillis(until)
		m.Match, err = audit.ParseGlob(pattern)
		return m, err
	})
}

// Unheeded implements audit.Outbox.
func (s *Store) Unheeded(ctx context.Context, sink string, before time.Time) ([]audit.Letter, error) {
	// One that the sink is still to be told of need not be told again.
	rows, err := s.read.QueryContext(ctx, `SELECT a.leaf_idx, l.body, r.upstream, r.repository, r.tag
		FROM alert a JOIN log_leaf l ON l.idx = a.leaf_idx JOIN ref r ON r.id = a.ref_id LEFT JOIN reminded m ON m.sink = ?1 AND m.leaf_idx = a.leaf_idx
		WHERE a.resolved IS NULL AND a.acknowledged IS NULL AND coalesce(m.at, a.opened) <= ?2
			AND NOT EXISTS (SELECT 1 FROM outbox o WHERE o.sink = ?1 AND o.leaf_idx = a.leaf_idx AND o.dead = 0)
		ORDER BY a.leaf_idx`, sink, millis(before))
	if err != nil {
		return nil, err
	}
	return collect(rows, func(scan scanner) (l audit.Letter, err error) {
		err = scan(&l.Index, &l.Leaf, &l.Ref.Upstream, &l.Ref.Repository, &l.Ref.Tag)
		return l, err
	})
}

// Remind implements audit.Outbox.
func (s *Store) Remind(ctx context.Context, sink string, indexes []int64, now time.Time) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		for _, i := range indexes {
			var times int
			if err := tx.QueryRowContext(ctx, `INSERT INTO reminded (sink, leaf_idx, at, times) VALUES (?, ?, ?, 1)
				ON CONFLICT (sink, leaf_idx) DO UPDATE SET at = excluded.at, times = times + 1 RETURNING times`, sink, i, millis(now)).Scan(&times); err != nil {
				return err
			}
			if _, err := tx.ExecContext(ctx, `INSERT INTO outbox (sink, leaf_idx, ref_id, next_at, reminder) SELECT ?, leaf_idx, ref_id, ?, ? FROM alert WHERE leaf_idx = ? AND resolved IS NULL
				ON CONFLICT (sink, leaf_idx) DO UPDATE SET dead = 0, batch = NULL, attempts = 0, next_at = excluded.next_at, reminder = excluded.reminder WHERE dead = 1`, sink, millis(now), times, i); err != nil {
				return err
			}
		}
		return nil
	})
}

// putNotice enters an event that is no entry of the log for those who are told of it. The
// same one again, because the first time was not known to have succeeded, changes nothing.
func putNotice(ctx context.Context, tx *sql.Tx, e audit.Event) error {
	if len(e.Recipients) == 0 {
		return nil
	}
	body, err := e.Leaf()
	if err != nil {
		return err
	}
	var known bool
	if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM notice WHERE event_id = ?)", e.ID.String()).Scan(&known); err != nil || known {
		return err
	}
	var index int64
	if err := tx.QueryRowContext(ctx, "INSERT INTO notice (idx, event_id, body) SELECT min(coalesce(min(idx), 0), 0) - 1, ?, ? FROM notice RETURNING idx", e.ID.String(), body).Scan(&index); err != nil {
		return err
	}
	// What nobody is told of any more is not kept. The newest is, for its number.
	if _, err := tx.ExecContext(ctx, "DELETE FROM notice WHERE idx > ? AND idx NOT IN (SELECT leaf_idx FROM outbox WHERE leaf_idx < 0)", index); err != nil {
		return err
	}
	return putRecipients(ctx, tx, 0, index, e)
}
