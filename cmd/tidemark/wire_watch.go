package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"tidemark/audit"
	"tidemark/config"
	"tidemark/proxy/upstream"
	"tidemark/proxy/watch"
)

// watchSeen is how long a tag is watched after the last client pulled it.
const watchSeen = 30 * 24 * time.Hour

// watched reads the patterns of what is to be watched.
func watched(c *config.Config) ([]audit.Glob, error) {
	var out []audit.Glob
	for _, text := range c.Watch.Refs {
		g, err := audit.ParseGlob(text)
		if err != nil {
			return nil, err
		}
		name, _, _ := strings.Cut(text, "/")
		switch {
		case !g.Possible():
			return nil, fmt.Errorf("%q stands for no tag: want upstream/repository:tag in full, such as docker.io/library/nginx:1.27", text)
		case !strings.ContainsAny(name, "*?") && c.Upstreams[name] == nil:
			return nil, fmt.Errorf("%q: %s is not one of upstreams", text, name)
		}
		out = append(out, g)
	}
	return out, nil
}

// lag is by how much the most overdue question about a watched tag is late.
func (s *server) lag() time.Duration {
	if s.watcher == nil {
		return 0
	}
	return s.watcher.Lag()
}

// wireWatcher makes who asks about tags that nobody pulls, if anything is to be
// watched and upstreams may be asked at all.
func (s *server) wireWatcher(upstreams map[string]*upstream.Upstream) error {
	patterns, err := watched(s.cfg)
	if err != nil {
		return fmt.Errorf("watch.refs: %w", err)
	}
	o := watch.Options{
		Patterns: patterns, Source: s.store, Log: s.log,
		Pace: watch.Pace{Base: time.Duration(s.cfg.Watch.Interval), Floor: time.Duration(s.cfg.Watch.Floor), Ceiling: time.Duration(s.cfg.Watch.Ceiling)},
		Ask: func(ctx context.Context, ref audit.Ref, every time.Duration) (audit.Answer, error) {
			return s.contents.Watch(ctx, s.ledger, ref, every)
		},
		List: s.contents.Tags,
		Rate: func(name string) watch.Rate {
			u := upstreams[name]
			if u == nil {
				return watch.Rate{}
			}
			h := u.Health()
			return watch.Rate{Limit: h.RateLimit, Remaining: h.RateLimitRemaining}
		},
	}
	if s.cfg.Watch.Seen && s.cfg.Registry.Auth.Mode != config.AuthPassthrough {
		o.Seen = watchSeen
	}
	if !s.cfg.Tags.Offline && (o.Seen > 0 || len(patterns) > 0) {
		s.watcher = watch.New(o)
	}
	return nil
}
