-- What the first version of the schema held after a few operations, for tests of later versions.
INSERT OR REPLACE INTO "audit" VALUES(1,1768478400000,'ann','put','',NULL,'{"period_budget":5}');
INSERT OR REPLACE INTO "audit" VALUES(2,1768478400001,'deleted-ab7c905bd4e3d705','delete','',NULL,NULL);
INSERT OR REPLACE INTO "cursors" VALUES('reader',2);
INSERT OR REPLACE INTO "customers" VALUES(1,'ann','18472e04ae7b250f','{"period_budget":5}','','ann

',1768478400000,1768478400000,2,1,3,21,11,4,3,1,1);
INSERT OR REPLACE INTO "customers" VALUES(2,'deleted-ab7c905bd4e3d705','',NULL,'','deleted-ab7c905bd4e3d705',1768478400000,1768478400000,1,0,1,5,0,0,0,0,0);
INSERT OR REPLACE INTO "entries" VALUES(1,1,'e1',1,739631,1768478400000,1768478400000,9,10,4,3,0,'m','a1','usage','manual','openai','ok',NULL,'{"model":"m","input_tokens":10,"output_tokens":4,"cache_read_tokens":3,"provider":"openai","latency_ms":200}');
INSERT OR REPLACE INTO "entries" VALUES(2,1,'e2',1,739632,1768564800000,1768564800000,12,1,0,0,0,'n',NULL,'usage','manual',NULL,'error','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','{"model":"n","input_tokens":1,"latency_ms":300,"status":"error","trace_id":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}');
INSERT OR REPLACE INTO "entries" VALUES(3,1,'e3',1,739632,1768564800000,1768564800000,NULL,0,0,0,0,'n',NULL,'usage','manual',NULL,'ok',NULL,'{}');
INSERT OR REPLACE INTO "entries" VALUES(4,2,'x',1,739632,1768478400000,1768564800000,5,0,0,0,0,'',NULL,'usage','manual',NULL,'ok',NULL,'{}');
INSERT OR REPLACE INTO "holds" VALUES(1,'a1',739631,'m',0,0,1768479000000,NULL,'[1768478400000, [0, 0], [0, 0], [[1768478400000, 0, 0]]]');
INSERT OR REPLACE INTO "meta" VALUES('epoch','a0051ddd196345805e474dec35de6efe');
INSERT OR REPLACE INTO "meta" VALUES('log_end','0');
INSERT OR REPLACE INTO "meta" VALUES('namespace','default');
INSERT OR REPLACE INTO "meta" VALUES('pruned_to','-1');
INSERT OR REPLACE INTO "rates" VALUES(1,60000,1768478400000,0,1);
INSERT OR REPLACE INTO "rollups" VALUES(1,739631,'m',1,1,9,10,4,3,0,0);
INSERT OR REPLACE INTO "rollups" VALUES(1,739632,'n',0,2,12,1,0,0,1,1);
INSERT OR REPLACE INTO "rollups" VALUES(2,739632,'',0,1,5,0,0,0,0,0);
INSERT OR REPLACE INTO "tombs" VALUES('fc8bd30c285abf1256b1131430a249d0',2,1768478400001);
