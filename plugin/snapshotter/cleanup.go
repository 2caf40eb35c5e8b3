/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/log"
)

// removeDirectories removes the directories that the database does not know, as the
// overlay snapshotter's Cleanup does. That one looks for them in a transaction that it
// commits, which costs two fsyncs for each garbage collection. This one has nothing to
// keep, and rolls back.
func (s *snapshotter) removeDirectories(ctx context.Context) error {
	unknown, err := s.unknownDirectories(ctx)
	if err != nil {
		return fmt.Errorf("look for directories that no snapshot has: %w", err)
	}
	for _, dir := range unknown {
		if err := os.RemoveAll(dir); err != nil {
			log.G(ctx).WithError(err).WithField("path", dir).Warn("failed to remove directory")
		}
	}
	return nil
}

func (s *snapshotter) unknownDirectories(ctx context.Context) (_ []string, err error) {
	// Writable, so that no snapshot is made in the meantime.
	ctx, tx, err := s.ms.TransactionContext(ctx, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, tx.Rollback()) }()
	known, err := storage.IDMap(ctx)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(s.root, "snapshots")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var unknown []string
	for _, e := range entries {
		if _, ok := known[e.Name()]; !ok {
			unknown = append(unknown, filepath.Join(dir, e.Name()))
		}
	}
	return unknown, nil
}
