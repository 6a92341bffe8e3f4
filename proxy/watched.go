package proxy

import (
	"context"
	"fmt"
	"net/url"
	"time"

	"tidemark/audit"
)

// Watch has the ledger ask upstream what ref means, as one who asks so
// often.
func (c *Contents) Watch(ctx context.Context, ledger *audit.Ledger, ref audit.Ref, every time.Duration) (audit.Answer, error) {
	repo, err := c.repository(ref)
	if err != nil {
		return audit.Answer{}, err
	}
	return ledger.Watch(ctx, ref, every, repo.ask(ref.Tag, "poll"))
}

// Tags returns the tags of a repository as upstream lists them.
func (c *Contents) Tags(ctx context.Context, upstream, repository string) ([]string, error) {
	repo, err := c.repository(audit.Ref{Upstream: upstream, Repository: repository})
	if err != nil {
		return nil, err
	}
	var all []string
	query := url.Values{"n": {"1000"}}
	for range tagPages {
		tags, next, err := repo.upstream.Tags(ctx, repository, query)
		if err != nil {
			return nil, err
		}
		if all = append(all, tags...); next == nil {
			return all, nil
		}
		query = next
	}
	return nil, fmt.Errorf("%s/%s has more tags than %d pages hold", upstream, repository, tagPages)
}
