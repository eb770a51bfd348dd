-- As sqlite-utils writes it for `enable-counts` and `enable-fts prompts desc --create-triggers`; older versions of it
-- write [brackets] in place of the double quotes.
CREATE VIRTUAL TABLE "prompts_fts" USING FTS5 (
    "desc",
    content="prompts"
);
INSERT INTO "prompts_fts" (rowid, "desc") SELECT rowid, "desc" FROM "prompts";
CREATE TRIGGER "prompts_ai" AFTER INSERT ON "prompts" BEGIN
  INSERT INTO "prompts_fts" (rowid, "desc") VALUES (new.rowid, new."desc");
END;
CREATE TRIGGER "prompts_ad" AFTER DELETE ON "prompts" BEGIN
  INSERT INTO "prompts_fts" ("prompts_fts", rowid, "desc") VALUES('delete', old.rowid, old."desc");
END;
CREATE TRIGGER "prompts_au" AFTER UPDATE ON "prompts" BEGIN
  INSERT INTO "prompts_fts" ("prompts_fts", rowid, "desc") VALUES('delete', old.rowid, old."desc");
  INSERT INTO "prompts_fts" (rowid, "desc") VALUES (new.rowid, new."desc");
END;
CREATE TABLE "_counts"(
   "table" TEXT PRIMARY KEY,
   count INTEGER DEFAULT 0
);
INSERT INTO "_counts" SELECT 'prompts', count(*) FROM "prompts";
INSERT INTO "_counts" SELECT 'images', count(*) FROM "images";
INSERT INTO "_counts" SELECT 'prompts_fts_docsize', count(*) FROM "prompts_fts_docsize";
CREATE TRIGGER "prompts_counts_insert" AFTER INSERT ON "prompts"
BEGIN
    INSERT OR REPLACE INTO "_counts"
    VALUES (
        'prompts',
        COALESCE(
            (SELECT count FROM "_counts" WHERE "table" = 'prompts'),
        0
        ) + 1
    );
END;
CREATE TRIGGER "images_counts_insert" AFTER INSERT ON "images"
BEGIN
    INSERT OR REPLACE INTO "_counts"
    VALUES (
        'images',
        COALESCE(
            (SELECT count FROM "_counts" WHERE "table" = 'images'),
        0
        ) + 1
    );
END;
CREATE TRIGGER "images_counts_delete" AFTER DELETE ON "images"
BEGIN
    INSERT OR REPLACE INTO "_counts"
    VALUES (
        'images',
        COALESCE(
            (SELECT count FROM "_counts" WHERE "table" = 'images'),
        0
        ) - 1
    );
END;
CREATE TRIGGER "prompts_fts_docsize_counts_insert" AFTER INSERT ON "prompts_fts_docsize"
BEGIN
    INSERT OR REPLACE INTO "_counts"
    VALUES (
        'prompts_fts_docsize',
        COALESCE(
            (SELECT count FROM "_counts" WHERE "table" = 'prompts_fts_docsize'),
        0
        ) + 1
    );
END;
