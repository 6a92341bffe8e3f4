package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"tidemark/audit"
	"tidemark/proxy/admin"
	"tidemark/proxy/upstream"
)

// examineUpstreams asks every upstream whether it answers, without credentials and
// with those that are configured, and one of them about a ref.
func examineUpstreams(ctx context.Context, upstreams map[string]*upstream.Upstream, ref *audit.Ref) []admin.UpstreamCheck {
	checks := make([]admin.UpstreamCheck, 0, len(upstreams))
	for name, up := range upstreams {
		checks = append(checks, admin.UpstreamCheck{Name: name, Endpoint: up.Endpoint().String()})
	}
	slices.SortFunc(checks, func(a, b admin.UpstreamCheck) int { return strings.Compare(a.Name, b.Name) })
	var g errgroup.Group
	for i := range checks {
		g.Go(func() error {
			examine(ctx, upstreams[checks[i].Name], ref, &checks[i])
			return nil
		})
	}
	_ = g.Wait() // what went wrong is in the checks
	return checks
}

func examine(ctx context.Context, up *upstream.Upstream, ref *audit.Ref, c *admin.UpstreamCheck) {
	c.Anonymous = timed(func() error { return up.As("").Ping(ctx) })
	if up.Identity() != "anonymous" {
		own := timed(func() error { return up.Ping(ctx) })
		c.Own = &own
	}
	if ref != nil && ref.Upstream == up.Name() {
		image := timed(func() error { _, err := up.HeadManifest(ctx, ref.Repository, ref.Tag); return err })
		c.Image = &image
	}
	h := up.Health()
	c.ClockAhead = h.ClockAhead.Seconds()
	if h.RateLimitRemaining >= 0 {
		c.RateLimitRemaining = &h.RateLimitRemaining
	}
}

// timed is how a question was answered.
func timed(ask func() error) admin.Check {
	began := time.Now()
	err := ask()
	c := admin.Check{Status: 200, Millis: time.Since(began).Milliseconds()}
	if err != nil {
		c.Status, c.Error = 0, err.Error()
		var ue *upstream.Error
		if errors.As(err, &ue) {
			c.Status = ue.Status
		}
	}
	return c
}
