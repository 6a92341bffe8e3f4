package proxy

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
)

// A view is a moment that a request is about, and how its paths begin.
type view struct {
	moment audit.Moment
	prefix string
}

// errPast refuses what would change the past.
var errPast = &oci.Error{Status: http.StatusMethodNotAllowed, Code: oci.Unsupported, Message: "the past can only be read"}

// viewed takes a moment off the path of a request, unless the address that it came
// to is bound to one. A name can begin with a moment only where nothing else says
// which upstream is meant: elsewhere names are upstream's, and it may have such ones.
func (h *Handler) viewed(r *http.Request, bound *view) (path string, v *view, err error) {
	path, ov, err := oci.CutBase(r.URL.Path)
	if err != nil {
		return "", nil, err
	}
	if _, hasNS, nerr := namespace(r.URL); ov == nil && nerr == nil && !hasNS && !h.o.Table.IsHost(r.Host) {
		if path, ov, err = oci.CutName(path); err != nil {
			return "", nil, err
		}
	}
	switch {
	case ov == nil:
		return path, bound, nil
	case bound != nil:
		return "", nil, badQuery("this address is bound to " + bound.moment.String() + " already")
	}
	v = &view{audit.AtIndex(ov.Index), ov.Prefix}
	if !ov.Time.IsZero() {
		v.moment = audit.AtTime(ov.Time)
	}
	return path, v, nil
}

// pastManifest answers with what a tag meant at the moment that the request is about.
// The ledger alone says which digest that was; the bytes come from the cache or, by
// digest, from upstream.
func (h *Handler) pastManifest(w http.ResponseWriter, r *http.Request, repo repository, req oci.Request, p *Pull) error {
	then, err := h.past(r.Context(), repo, req.Tag)
	if err != nil {
		return err
	}
	p.Digest = then.Digest
	if !repo.isOpen() {
		if then.Basis != audit.Observed { // others say that the repository has it
			if err := repo.mayRead(r.Context(), oci.Manifest, "", then.Digest); err != nil {
				return err
			}
		}
		repo.rights.join(member{repo.Upstream, repo.Repository, then.Digest})
	}
	m, outcome, err := h.o.Cache.Manifest(r.Context(), then.Digest, repo.manifest(then.Digest))
	if err != nil {
		return err
	}
	head := w.Header()
	head["Tidemark-Log-Index"] = []string{strconv.FormatInt(then.Index, 10)}
	head["Tidemark-Valid-From"] = []string{then.From.Format(time.RFC3339)}
	if then.Until != nil {
		head["Tidemark-Valid-Until"] = []string{then.Until.Format(time.RFC3339)}
	}
	head["Tidemark-Basis"] = []string{then.Basis}
	if then.Gap != "" {
		head["Tidemark-Warning"] = []string{then.Gap}
	}
	head["Cache-Status"] = contentStatus(outcome)
	p.Source = outcome.String()
	return h.sendManifest(w, r, repo, m, p)
}

// past is what a tag meant at the moment that a request is about. A rule that denies
// the tag denies its past.
func (h *Handler) past(ctx context.Context, repo repository, tag string) (audit.Then, error) {
	ref, policy := repo.ref(tag), h.o.Ledger.Policy()
	if policy.Rule(ref).Mode == audit.Deny {
		return audit.Then{}, audit.ErrDenied
	}
	c, err := h.o.Chronicle(ctx, ref)
	if err != nil {
		return audit.Then{}, err
	}
	c.GapAfter = policy.GapAfter()
	then, err := c.AsOf(repo.view.moment, h.o.Now())
	if err == nil && policy.Denies(then.Digest) {
		err = &audit.PastError{Ref: ref, Moment: repo.view.moment, What: fmt.Sprintf("%s is denied (audit.denied)", then.Digest)}
	}
	if err == nil && then.Gap != "" && h.o.RefuseGaps {
		err = &audit.PastError{Ref: ref, Moment: repo.view.moment, What: "that is not certain (audit.gaps: refuse): " + then.Gap}
	}
	return then, err
}

// pastTags are the tags that a repository had at the moment, as far as is known.
func (h *Handler) pastTags(w http.ResponseWriter, r *http.Request, repo repository, p *Pull) error {
	if !repo.isOpen() {
		// Who may see the tags now may see those of before.
		if _, _, err := repo.upstream.Tags(r.Context(), repo.Repository, r.URL.Query()); err != nil && !(silent(err) && repo.mayList()) {
			return err
		}
	}
	query := r.URL.Query()
	if _, err := pageSize(query); err != nil {
		return err
	}
	known, err := h.o.KnownTagsAt(r.Context(), repo.Upstream, repo.Repository, repo.view.moment)
	if err != nil {
		return err
	}
	if len(known) == 0 {
		return &oci.Error{Status: http.StatusNotFound, Code: oci.NameUnknown, Message: "nothing of this repository was known at " + repo.view.moment.String(), Detail: detail{Upstream: repo.Upstream}}
	}
	p.Source = cache.Hit.String()
	return h.sendTags(w, r, repo, p, known, contentStatus(cache.Hit))
}
