package watch

import (
	"context"
	"strings"
	"time"

	"tidemark/audit"
)

// listed are the tags of a repository, as upstream listed them.
type listed struct {
	tags []string
	at   time.Time
}

// wanted returns all refs that are to be watched, with the number of clients that
// pulled them lately.
func (w *Watcher) wanted(ctx context.Context, lists map[string]listed) (map[audit.Ref]int, error) {
	out := make(map[audit.Ref]int)
	add := func(ref audit.Ref, clients int) {
		if _, there := out[ref]; there || len(out) < refsMost {
			out[ref] = max(out[ref], clients)
		} else if len(out) == refsMost {
			w.log.Warn().Int("refs", refsMost).Msg("more tags than can be watched; narrow watch.refs")
		}
	}
	if w.o.Seen > 0 {
		pulled, err := w.o.Source.Pulled(ctx, time.Now().Add(-w.o.Seen))
		if err != nil {
			return nil, err
		}
		for _, p := range pulled {
			add(p.Ref, p.Clients)
		}
	}
	var known []audit.Ref
	for _, g := range w.o.Patterns {
		pattern := g.String()
		repository, tag := split(pattern)
		repositories := []string{repository}
		if strings.ContainsAny(repository, "*?") {
			if known == nil {
				var err error
				if known, err = w.o.Source.Known(ctx); err != nil {
					return nil, err
				}
			}
			repositories = matching(known, repository, tag)
		}
		for _, r := range repositories {
			upstream, name, _ := strings.Cut(r, "/")
			if !strings.ContainsAny(tag, "*?") && tag != "" {
				add(audit.Ref{Upstream: upstream, Repository: name, Tag: tag}, 0)
				continue
			}
			for _, t := range w.list(ctx, lists, upstream, name) {
				if ref := (audit.Ref{Upstream: upstream, Repository: name, Tag: t}); g.Matches(ref) {
					add(ref, 0)
				}
			}
		}
	}
	return out, nil
}

// split parts a pattern into those of the repository and of the tag, which may be
// "" when ** stands for both.
func split(pattern string) (repository, tag string) {
	if i := strings.LastIndexByte(pattern, ':'); i > strings.LastIndexByte(pattern, '/') {
		return pattern[:i], pattern[i+1:]
	}
	return pattern, ""
}

// matching are the known repositories that a pattern stands for.
func matching(known []audit.Ref, repository, tag string) []string {
	if tag == "" {
		repository += "**" // which may reach into the tag
	}
	g, err := audit.ParseGlob(repository + ":x")
	if err != nil {
		return nil // the whole pattern was read before
	}
	var out []string
	for _, k := range known {
		k.Tag = "x"
		if g.Matches(k) {
			out = append(out, k.Upstream+"/"+k.Repository)
		}
	}
	return out
}

// list returns the tags of a repository, which upstream is asked for now and then.
// A list that cannot be had is that from before.
func (w *Watcher) list(ctx context.Context, lists map[string]listed, upstream, repository string) []string {
	key := upstream + "/" + repository
	l := lists[key]
	if time.Since(l.at) < listEvery || w.o.Rate(upstream).spent() {
		return l.tags
	}
	tags, err := w.o.List(ctx, upstream, repository)
	if err != nil {
		if ctx.Err() == nil {
			w.log.Warn().Err(err).Str("upstream", upstream).Str("repo", repository).Msg("the tags of a watched repository could not be listed")
		}
		return l.tags
	}
	lists[key] = listed{tags, time.Now()}
	return tags
}
