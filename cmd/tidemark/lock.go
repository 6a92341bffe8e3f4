package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"tidemark/audit"
	"tidemark/audit/taglog"
	"tidemark/proxy/admin"
)

// A LockFile says what tags meant at a place in a log. docs/formats.md has the format.
type LockFile struct {
	Version    int           `json:"version"`
	Origin     string        `json:"origin"`
	Index      int64         `json:"index"`      // of the entry after which the tags meant this
	Checkpoint string        `json:"checkpoint"` // signed, of a tree with that entry
	Images     []LockedImage `json:"images"`     // in order of their refs
}

// A LockedImage is what one tag meant.
type LockedImage struct {
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest"`
}

func newLock() *cobra.Command {
	var out, asof string
	var files []string
	c := &cobra.Command{
		Use:   "lock REF...",
		Short: "Write down what tags mean, to build with the same images again",
		Long: `Write a lock file: the digest of every tag, at one place in the log, with the
signed checkpoint that proves what the log was. Whoever pulls below /at/INDEX, or
the digests themselves, gets the same images for ever. With --asof it is what the
tags meant then.`,
		Example: `  tidemark lock golang:1.26 alpine -o images.lock
  tidemark lock -f compose.yaml -o images.lock
  tidemark lock -f compose.yaml --asof 2026-10-01 -o images.lock`,
	}
	cl := addClient(c)
	c.Flags().StringVarP(&out, "output", "o", "-", "file to write; - is standard output")
	c.Flags().StringArrayVarP(&files, "file", "f", nil, "file that names images: a list, a compose file or Kubernetes manifests; - is standard input")
	c.Flags().StringVar(&asof, "asof", "", "a date or a time, such as 2026-10-01 or 2026-10-01T12:00:00Z")
	c.RunE = func(c *cobra.Command, args []string) error {
		refs, err := taggedRefs(c, args, files)
		if err != nil {
			return err
		}
		lock, err := cl.lock(c.Context(), refs, asof)
		if err != nil {
			return err
		}
		b, err := json.MarshalIndent(lock, "", "  ")
		if err != nil {
			return err
		}
		b = append(b, '\n')
		if out == "-" {
			_, err := c.OutOrStdout().Write(b)
			return err
		}
		return audit.WriteFile(out, b, 0o644)
	}
	return c
}

// lock asks what refs mean at one place in the log: now, or at a time.
func (cl *client) lock(ctx context.Context, refs []string, asof string) (LockFile, error) {
	if _, err := cl.awaitSigned(ctx); err != nil {
		return LockFile{}, err
	}
	signed, err := cl.get(ctx, "/log/checkpoint", nil)
	if err != nil {
		return LockFile{}, err
	}
	checkpoint, err := taglog.Parse(signed)
	if err != nil {
		return LockFile{}, fmt.Errorf("%s/log/checkpoint: %w", cl.server, err)
	}
	lock := LockFile{Version: 1, Origin: checkpoint.Origin, Index: checkpoint.N - 1, Checkpoint: string(signed), Images: []LockedImage{}}
	q := url.Values{"at": {strconv.FormatInt(lock.Index, 10)}}
	if asof != "" {
		if q, lock.Index, err = cl.placeAt(ctx, asof); err != nil {
			return LockFile{}, err
		}
	}
	var missing []string
	for _, ref := range refs {
		q.Set("ref", ref)
		var past admin.Past
		if err := cl.getJSON(ctx, "/api/v1/tags/asof", q, &past); err != nil {
			missing = append(missing, err.Error())
			continue
		}
		lock.Images = append(lock.Images, LockedImage{ref, past.Digest})
	}
	if len(missing) > 0 {
		return LockFile{}, fmt.Errorf("nothing was written:\n%s", strings.Join(missing, "\n"))
	}
	return lock, nil
}

// placeAt is the last entry that was recorded at a time, and how to ask about the time.
func (cl *client) placeAt(ctx context.Context, asof string) (url.Values, int64, error) {
	when, err := ago(asof, time.Now())
	if err != nil {
		return nil, 0, err
	}
	at, err := time.Parse(time.RFC3339, when)
	if err != nil {
		return nil, 0, err
	}
	var list admin.EventList
	until := url.Values{"until": {at.Add(time.Millisecond).Format(time.RFC3339Nano)}, "order": {"desc"}, "limit": {"1"}}
	if err := cl.getJSON(ctx, "/api/v1/events", until, &list); err != nil {
		return nil, 0, err
	}
	if len(list.Events) == 0 {
		return nil, 0, fmt.Errorf("nothing was recorded here by %s", when)
	}
	return url.Values{"asof": {strings.ToLower(at.UTC().Format("2006-01-02T15-04-05Z"))}}, list.Events[0].Index, nil
}

func newBackfill() *cobra.Command {
	c := &cobra.Command{
		Use:   "backfill REF...",
		Short: "Ask upstream what tags meant before they were seen here",
		Long: `Ask upstream what tags meant before they were first seen here, if it says so: Quay's
tag history, _oci/tag-history, or Chainguard's (upstreams.NAME.history). What it
says is kept as its word, marked upstream-asserted, and answers only for times before
anything was seen here.`,
		Example: "  tidemark backfill quay.io/prometheus/prometheus:latest",
		Args:    cobra.MinimumNArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		var reports []admin.BackfillReport
		for _, arg := range args {
			ref, err := expandRef(arg)
			if err != nil {
				return err
			}
			var r admin.BackfillReport
			if err := cl.postJSON(c.Context(), "/api/v1/tags/backfill", map[string]string{"ref": ref.String()}, &r); err != nil {
				return err
			}
			if reports = append(reports, r); !*asJSON {
				fmt.Fprintf(c.OutOrStdout(), "%s  %d stretches by the word of %s, %d of them new\n", r.Ref, len(r.History), r.Source, r.Added)
			}
		}
		if *asJSON {
			return printJSON(c, reports)
		}
		return nil
	}
	return c
}
